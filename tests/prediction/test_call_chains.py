"""Draws belong to the calls that asked for them: threads, tasks, generators, nesting, copies, and other ways in."""

import asyncio
import copy
import inspect
import io
import sys
import threading

import pytest
import torch
from families import FAMILIES, logits
from peft import LoraConfig, get_peft_model
from stochastic_models import bayesian, curve, random_a
from torch import nn

import peft_calib
from peft_calib import BayesianLoraConfig, CurveLoraConfig, curve_at, draws, predict, predict_dataset, score_texts
from peft_calib.prediction import sample_generate
from peft_calib.tuners.laws import holders_of

BERT, LLAMA = FAMILIES["bert"], FAMILIES["llama"]
LAWS = {"bayesian": bayesian, "curve": curve, "random_a": random_a}


@pytest.fixture(autouse=True)
def eager_switching():
    """Threads take turns as often as they can, so that whoever shares state is found out."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*questions, times: int = 10) -> None:
    """Ask every question in a thread of its own, over and over, and compare with the answer it has alone."""
    expected, faults = [ask() for ask in questions], []

    def work(number):
        try:
            for _ in range(times):
                torch.testing.assert_close(questions[number](), expected[number], rtol=0, atol=1e-5)
        except BaseException as error:
            faults.append((number, error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults


def drawn(model, batch, num_samples, **options):
    with torch.no_grad(), draws(model, num_samples, **options):
        return model(**batch).logits


# ----------------------------------------------------------------- threads


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("law", LAWS)
def test_each_thread_gets_its_own_answer(law, training):
    model, batch = LAWS[law](BERT).train(training), BERT.batch(3)
    questions = [
        lambda: predict(model, batch, num_samples=3, seed=0).sample_probabilities,
        lambda: predict(model, batch, num_samples=2, seed=1).sample_probabilities,
        lambda: predict(model, batch, how="late", num_samples=2, seed=1).sample_probabilities,
        lambda: predict(model, batch, how="linear", num_samples=2, seed=2).sample_probabilities,
        lambda: predict(model, batch, num_samples="auto", seed=3, max_samples=6).probabilities,
        lambda: predict(model, batch, how="mean").sample_probabilities,
    ]
    if not training:
        questions += [lambda: logits(model, batch), lambda: drawn(model, batch, 3, seed=4)]
    together(*questions)
    assert all(module.training == training for module in model.modules())


def test_data_sets_texts_and_generation_in_threads():
    model, batch = bayesian(LLAMA), LLAMA.batch(2)
    ids = batch["input_ids"]
    rows = [{"input_ids": row} for row in ids.repeat(2, 1)]
    together(
        lambda: predict_dataset(model, rows, num_samples=2, batch_size=2, progress=False).sample_probabilities,
        lambda: score_texts(model, ids, ids, num_samples=2, seed=1).sample_log_probabilities,
        lambda: sample_generate(model, batch, num_samples=2, seed=2, max_new_tokens=3).log_probabilities,
        lambda: sample_generate(model, batch, 2, seed=3, max_new_tokens=3, do_sample=True).log_probabilities,
        lambda: logits(model, batch),
        times=3,
    )


def test_dropout_and_ensembles_in_threads():
    model, batch = (
        get_peft_model(BERT.build(), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)),
        None,
    )
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    model.eval()
    batch = BERT.batch(3)
    together(
        lambda: predict(model, batch, dropout=0.5, num_samples=3, seed=0).sample_probabilities,
        lambda: predict(model, batch, dropout=0.3, num_samples=2, seed=1).sample_probabilities,
        lambda: predict(model, batch, adapter_names=["default", "other"]).sample_probabilities,
        lambda: predict(model, batch, how="late", adapter_names=["other", "default"]).sample_probabilities,
        lambda: predict(model, batch, how="mean").sample_probabilities,
        lambda: logits(model, batch),
    )


def test_heads_that_are_part_of_the_curve_in_threads():
    model = curve(BERT, modules_to_save=["classifier"], curve_modules_to_save=True)
    batch = BERT.batch(3)
    together(
        lambda: predict(model, batch, num_samples=3).sample_probabilities,
        lambda: predict(model, batch, num_samples=4).sample_probabilities,
        lambda: logits(model, batch),
    )


def test_mixed_batches_in_threads():
    model, batch = bayesian(BERT), BERT.batch(2)
    model.add_adapter("other", BayesianLoraConfig(r=2, target_modules=["query"], init="random", num_train_examples=9))
    model.eval()

    def mixed(*names):
        with torch.no_grad():
            return model(**batch, adapter_names=list(names)).logits

    together(
        lambda: mixed("default", "other"),
        lambda: mixed("__base__", "default"),
        lambda: predict(model, batch, num_samples=2).sample_probabilities,
        lambda: logits(model, batch),
    )


@pytest.mark.parametrize("law", ["bayesian", "curve"])
def test_a_training_thread_trains_and_a_predicting_one_predicts(law):
    """With parameters that stay where they are: every loss has its regulariser, and every answer is the right one."""
    model = LAWS[law](BERT, **({} if law == "bayesian" else {"jsd_weight": 0.2})).train()
    batch, labels = BERT.batch(3), torch.tensor([0, 1, 2])
    expected = predict(model, batch, num_samples=2, seed=1).sample_probabilities
    faults, done = [], threading.Event()

    def train():
        try:
            for _ in range(30):
                output = model(**batch, labels=labels)
                output.loss.backward()
                terms = peft_calib.regularization_loss(model)
                if output.logits.shape != (3, 3) or terms is None:
                    faults.append((output.logits.shape, terms))
        except BaseException as error:
            faults.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=train)
    thread.start()
    while not done.is_set():
        found = predict(model, batch, num_samples=2, seed=1).sample_probabilities
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    thread.join()
    assert not faults, faults
    assert all(module.training for module in model.modules())


def in_thread(function):
    """What a function returned or raised in another thread."""
    found = []

    def work():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_training_while_draws_are_open_elsewhere_is_refused():
    model, batch = bayesian(BERT).train(), BERT.batch()
    with draws(model, 2):
        error = in_thread(lambda: model(**batch))
        assert isinstance(error, RuntimeError) and "another thread or task" in str(error)
    assert in_thread(lambda: model(**batch)).logits.shape == (2, 3)


def test_switching_to_training_while_another_thread_evaluates_is_told():
    model, batch = bayesian(BERT), BERT.batch()
    with torch.no_grad(), draws(model, 2):
        in_thread(model.train)
        with pytest.raises(RuntimeError, match="Another thread has put the model into training mode"):
            model(**batch)
    assert model.training  # the last wish counts
    model.train()
    with draws(model, 2):
        in_thread(model.eval)
    assert not model.training and not any(module.training for module in model.modules())


def test_recomputation_in_evaluation_mode_is_refused():
    model, batch = bayesian(BERT).train(), BERT.batch()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**batch).logits.sum()
    opened, close = threading.Event(), threading.Event()

    def hold():
        with draws(model, 2):
            opened.set()
            close.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    opened.wait()
    try:
        with pytest.raises(RuntimeError, match="another thread has the model in evaluation mode"):
            loss.backward()
    finally:
        close.set()
        thread.join()


def test_regularisers_belong_to_the_thread_that_made_them():
    model, batch = bayesian(BERT).train(), BERT.batch()
    model(**batch)
    assert in_thread(lambda: peft_calib.regularization_loss(model)) is None
    assert peft_calib.regularization_loss(model).requires_grad


# ----------------------------------------------------------------- inside each other


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("how", ["mean", "sample", "late", "linear"])
def test_a_prediction_inside_draws_is_that_outside(law, how):
    model, batch = LAWS[law](BERT), BERT.batch(3)
    outside = predict(model, batch, how=how, num_samples=3, seed=5).sample_probabilities
    with torch.no_grad(), draws(model, 2, seed=0):
        before = model(**batch).logits
        inside = predict(model, batch, how=how, num_samples=3, seed=5).sample_probabilities
        assert torch.equal(model(**batch).logits, before)  # the outer draws are in place again
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-6)


def test_the_innermost_draws_count():
    model, batch = curve(BERT), BERT.batch(3)
    two, three = drawn(model, batch, 2), drawn(model, batch, 3)
    with torch.no_grad(), curve_at(model, 0.3):
        point = model(**batch).logits
    with torch.no_grad(), draws(model, 2):
        with draws(model, 3):
            torch.testing.assert_close(model(**batch).logits, three)
        with curve_at(model, 0.3):
            torch.testing.assert_close(model(**batch).logits, point)
            with draws(model, 3):
                torch.testing.assert_close(model(**batch).logits, three)
        torch.testing.assert_close(model(**batch).logits, two)


def test_the_mean_inside_a_point_of_a_curve_is_the_point():
    model, batch = curve(BERT), BERT.batch(3)
    with torch.no_grad(), curve_at(model, 0.3):
        expected = model(**batch).logits.softmax(-1)
        torch.testing.assert_close(predict(model, batch, how="mean").probabilities, expected)
        assert predict(model, batch, num_samples=2).sample_probabilities.shape == (2, 3, 3)
    with curve_at(model, [0.0, 1.0]), pytest.raises(ValueError, match="curve_at has put 2 points in place"):
        predict(model, batch, how="mean")


def test_draws_of_two_models_are_apart():
    one, other, batch = bayesian(BERT), bayesian(BERT, seed=1), BERT.batch(3)
    with torch.no_grad(), draws(one, 2), draws(other, 4):
        assert len(one(**batch).logits) == 6
        assert len(other(**batch).logits) == 12
        assert predict(one, batch, how="mean").sample_probabilities.shape == (1, 3, 3)


def test_two_base_models_in_one_module():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = bayesian(BERT), bayesian(BERT, seed=1)

        def forward(self, **batch):
            return self.left(**batch).logits - self.right(**batch).logits

    pair, batch = Pair(), BERT.batch(3)
    with torch.no_grad():
        alone = [drawn(side, batch, 2, seed=3) for side in (pair.left, pair.right)]
        with draws(pair, 2, seed=3):
            torch.testing.assert_close(pair(**batch), alone[0] - alone[1])


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle"])
def test_a_copy_made_inside_knows_nothing_of_the_draws(duplicate):
    model, batch = bayesian(BERT), BERT.batch(3)
    expected = logits(model, batch)
    with torch.no_grad(), draws(model, 2):
        model(**batch)
        if duplicate == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert torch.equal(twin(**batch).logits, expected)
        assert len(model(**batch).logits) == 6
    assert torch.equal(logits(twin, batch), expected)
    assert torch.equal(drawn(twin, batch, 2), drawn(model, batch, 2))


def test_merging_several_functions_is_refused_and_one_is_merged():
    model, batch = bayesian(BERT), BERT.batch(3)
    one, base = drawn(model, batch, 1, first=2), copy.deepcopy(model.state_dict())
    with draws(model, 2):
        for merge in (model.merge_adapter, lambda: model.merge_and_unload(), model.base_model.get_factors):
            with pytest.raises(ValueError, match="no single pair of factors"):
                merge()
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    with draws(model, 1, first=2):
        model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), one, rtol=0, atol=1e-5)


# ----------------------------------------------------------------- tasks and generators


def test_tasks_do_not_see_each_others_draws():
    model, batch = bayesian(BERT), BERT.batch(3)

    async def sampled(num_samples, seed):
        with draws(model, num_samples, seed=seed):
            for _ in range(3):
                await asyncio.sleep(0)
                found = logits(model, batch)
        return found

    async def plain():
        for _ in range(3):
            await asyncio.sleep(0)
            found = logits(model, batch)
        return found

    async def threaded():
        with draws(model, 2, seed=7):
            return await asyncio.to_thread(logits, model, batch)

    async def gathered():
        return await asyncio.gather(sampled(2, 0), plain(), sampled(3, 1), threaded())

    found = asyncio.run(gathered())
    expected = [drawn(model, batch, 2, seed=0), logits(model, batch), drawn(model, batch, 3, seed=1)]
    for got, want in zip(found, [*expected, drawn(model, batch, 2, seed=7)], strict=True):
        torch.testing.assert_close(got, want)


def test_a_task_that_outlives_the_context_is_plain_again():
    model, batch = bayesian(BERT), BERT.batch(3)

    async def late():
        await asyncio.sleep(0.01)
        return logits(model, batch)

    async def main():
        with draws(model, 2):
            task = asyncio.create_task(late())
        return await task

    assert asyncio.run(main()).shape == (3, 3)


def test_generators_keep_their_draws_to_themselves():
    model, batch = bayesian(BERT), BERT.batch(3)

    def stream(num_samples, seed):
        with draws(model, num_samples, seed=seed):
            for _ in range(3):
                yield logits(model, batch)

    plain, one, two = logits(model, batch), drawn(model, batch, 2, seed=0), drawn(model, batch, 3, seed=1)
    first, second = stream(2, 0), stream(3, 1)
    for _ in range(3):
        assert torch.equal(next(first), one)
        assert torch.equal(logits(model, batch), plain)
        assert torch.equal(next(second), two)
    first.close()
    second.close()
    assert torch.equal(logits(model, batch), plain)


def test_a_context_around_draws_acts_on_the_code_inside():
    import contextlib

    model, batch = bayesian(BERT), BERT.batch(3)

    @contextlib.contextmanager
    def mine():
        with torch.no_grad(), draws(model, 2):
            yield

    with mine():
        assert len(model(**batch).logits) == 6
    with contextlib.ExitStack() as stack:
        stack.enter_context(mine())
        assert len(model(**batch).logits) == 6
    assert len(model(**batch).logits) == 3


# ----------------------------------------------------------------- ways in that run no hook


class Caller(nn.Module):
    """Calls `forward` itself and pools over its own mask, as wrappers of sentence encoders do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, features):
        hidden = self.inner.forward(**features)[0]
        mask = features["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)


def encoder():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {name: value for name, value in BERT.settings.items() if name != "num_labels"}
    model = BertModel(BertConfig(**sizes))
    model.add_adapter(
        BayesianLoraConfig(r=4, target_modules=["query"], init="random", init_sd=0.5, num_train_examples=8)
    )
    return model


def test_a_direct_forward_has_a_regulariser_draws_and_a_warning():
    model, batch = Caller(encoder()), BERT.batch(3)
    model.train()
    model(batch).sum().backward()
    term = peft_calib.regularization_loss(model)
    assert term is not None and term > 0
    model(batch).sum().backward()
    with pytest.warns(UserWarning, match="reached no loss"):
        model(batch)
    model.eval()
    with torch.no_grad():
        with draws(model, 3, seed=2):
            batched = model(batch)
        alone = []
        for k in range(3):
            with draws(model, 1, seed=2, first=k):
                alone.append(model(batch))
    torch.testing.assert_close(batched, torch.cat(alone), rtol=0, atol=1e-5)
    assert model(batch).shape == (3, 32)


def test_a_direct_forward_of_each_wrapper_is_a_call():
    model, batch, labels = bayesian(BERT).train(), BERT.batch(3), torch.tensor([0, 1, 2])
    base = model.get_base_model()
    for forward in (model.forward, model.base_model.forward, base.forward):
        output = forward(**batch, labels=labels)
        holder = holders_of(model)[0]
        task = torch.nn.functional.cross_entropy(output.logits, labels)
        torch.testing.assert_close(output.loss, task + sum(holder.pending))
        assert not holder.now.here.unclaimed
        with torch.no_grad(), draws(model, 2, seed=1):
            assert torch.equal(forward(**batch).logits, model(**batch).logits)
    with torch.no_grad(), draws(model, 2, seed=1):
        expected = model(**batch).logits
        assert torch.equal(
            torch.func.functional_call(model, dict(model.named_parameters()), (), batch).logits, expected
        )


def test_the_entrance_leaves_with_the_adapter():
    base = BERT.build()
    signature = str(inspect.signature(base.forward))
    model = get_peft_model(base, BayesianLoraConfig(r=2, target_modules=["query"]))
    assert str(inspect.signature(base.forward)) == signature
    assert "forward" in base.__dict__
    assert "forward" not in model.unload().__dict__
    base = BERT.build()
    get_peft_model(base, CurveLoraConfig(r=2, target_modules=["query"])).delete_adapter("default")
    assert "forward" not in base.__dict__


def test_an_interrupt_leaves_nothing_behind():
    model, batch = bayesian(BERT), BERT.batch(3)
    expected = logits(model, batch)
    handle = model.get_base_model().classifier.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt), draws(model, 2):
        model(**batch)
    handle.remove()
    assert torch.equal(model.get_base_model().forward(**batch).logits, expected)
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("law", LAWS)
def test_an_error_inside_draws_leaves_the_model_as_it_was(law, training):
    """Whether it was raised between forwards, in one, or in a prediction inside."""
    model, batch = LAWS[law](BERT).train(training), BERT.batch(3)
    before, mean = copy.deepcopy(model.state_dict()), predict(model, batch, how="mean").probabilities
    broken = {**batch, "input_ids": batch["input_ids"] + 1000}  # out of the vocabulary
    for fault in (lambda: 1 / 0, lambda: model(**broken), lambda: predict(model, broken, num_samples=3)):
        with pytest.raises((ZeroDivisionError, IndexError)), draws(model, 2), torch.no_grad():
            fault()
        assert all(module.training == training for module in model.modules())
        assert torch.equal(predict(model, batch, how="mean").probabilities, mean)
        with torch.no_grad():
            assert len(model(**batch).logits) == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_entrance_stays_when_accelerate_takes_its_wrapper_off():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import extract_model_from_parallel

    model, batch = encoder().eval(), BERT.batch(3)
    # one state a process: a Trainer of another test has made it without mixed precision, the next would find ours
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        wrapped = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        for each in (wrapped, extract_model_from_parallel(wrapped, keep_fp32_wrapper=False)):
            with torch.no_grad(), draws(each, 2):
                assert len(each.forward(**batch)[0]) == len(each(**batch)[0]) == 6
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_texts_inside_draws_are_those_outside():
    model, batch = bayesian(LLAMA), LLAMA.batch(2)
    ids = batch["input_ids"]
    written = sample_generate(model, batch, 3, seed=2, max_new_tokens=3).sequences
    scored = score_texts(model, ids, ids, num_samples=2).log_probabilities
    with draws(model, 2):
        assert torch.equal(sample_generate(model, batch, 3, seed=2, max_new_tokens=3).sequences, written)
        assert torch.equal(score_texts(model, ids, ids, num_samples=2).log_probabilities, scored)
