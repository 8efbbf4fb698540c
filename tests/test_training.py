"""Training: the loops, prediction, `fit`, and what kills, damage and full disks may not do to it."""
import errno
import functools
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import ecg_helpers as helpers

N, SAMPLES, BATCH, EPOCHS = 24, 256, 5, 4  # 18 training exams: batches of 5, 5, 4, 4
TRAIN, VALID = np.arange(18), np.arange(18, N)
STEPS = math.ceil(len(TRAIN) / BATCH)
DAMAGE = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:len(data) // 2],
    "garbage": lambda data: bytes(range(256)) * (len(data) // 256),
    "zeros inside": lambda data: data[:len(data) // 2] + bytes(64) + data[len(data) // 2 + 64:],
}


# ------------------------------------------------------------------------------------------------
# A tiny data set, a tiny network, one training
# ------------------------------------------------------------------------------------------------
@functools.cache
def exams():
    """24 random tracings (24, 256, 8) and targets; half of the exams carry a hint of their class."""
    generator = torch.Generator().manual_seed(1)
    targets = (torch.arange(N) % 3 == 0).float()
    traces = torch.randn(N, SAMPLES, 8, generator=generator)
    traces[::2, :, 0] += 0.5 * targets[::2, None]
    return traces, targets


class Net(torch.nn.Sequential):
    """Convolution, BatchNorm and dropout: parameters, buffers and random numbers that a resume must restore."""

    def __init__(self):
        super().__init__(torch.nn.Conv1d(8, 6, 9, stride=8), torch.nn.BatchNorm1d(6), torch.nn.ReLU(),
                         torch.nn.AdaptiveAvgPool1d(1), torch.nn.Flatten(), torch.nn.Dropout(0.3),
                         torch.nn.Linear(6, 1))

    def forward(self, traces):
        return super().forward(traces.transpose(1, 2))


class Mean(torch.nn.Module):
    """A network without random numbers or buffers: mean of each lead, then a linear layer."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 1)

    def forward(self, traces):
        return self.linear(traces.mean(dim=1))


class FirstSample(torch.nn.Module):
    """The logit is the first sample of the first lead; notes how it was called."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = torch.nn.Parameter(torch.ones(())), []

    def forward(self, traces):
        self.calls.append((self.training, torch.is_grad_enabled(), len(traces)))
        return self.weight * traces[:, 0, :1]


class Stop(BaseException):
    """Ends a training run where it stands, as a kill does."""


def noise(traces):
    return traces + 0.3 * torch.randn_like(traces)


def make_optimizer(kind, model, lr, weight_decay=0.0):
    return getattr(torch.optim, kind)(model.parameters(), lr=lr, weight_decay=weight_decay)


PLANS = {  # name: (optimizer, learning rate, scheduler of the optimizer, further arguments of fit)
    "plateau": ("Adam", 0.02, lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0), {}),
    "one cycle, average": (
        "AdamW", 0.01, lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=EPOCHS * STEPS),
        {"augment": noise, "ema_decay": 0.8, "max_norm": 1.0, "select": "auroc"}),
    "each epoch": ("RMSprop", 0.01, lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7), {"select": "last"}),
    "constant": ("SGD", 0.3, None, {}),
}


def train(run_dir, plan="plateau", *, start=0, net=Net, lr=None, weight_decay=0.0, schedule=None, traces=None,
          train_loader=None, stop=None, error=Stop, before_batch=None, **changes):
    """One small run of `fit`: history, model, optimizer, scheduler. `changes` go to `fit`.

    `stop`: so many training batches are done, then `error` is raised. `before_batch`: called before each of them. Both
    are hooks on the network: other code would be another run.
    """
    kind, rate, planned, arguments = PLANS[plan]
    torch.manual_seed(start)
    model, count = net(), itertools.count()

    def hook(model, batch):
        if model.training and next(count) == stop:
            raise error
        if model.training and before_batch:
            before_batch()
    model.register_forward_pre_hook(hook)
    optimizer = make_optimizer(kind, model, lr or rate, weight_decay)
    schedule = schedule or planned
    scheduler = schedule(optimizer) if schedule else None
    everything, targets = exams()
    traces = everything if traces is None else traces
    arguments = {"epochs": EPOCHS, "loss_function": torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.5])),
                 "settings": {"data": "tiny"}, **arguments, **changes}
    history = helpers.fit(model, train_loader or helpers.BatchLoader(traces, targets, TRAIN, BATCH, shuffle=True),
                          helpers.BatchLoader(traces, targets, VALID, BATCH), optimizer=optimizer,
                          scheduler=scheduler, device="cpu", run_dir=run_dir, **arguments)
    return SimpleNamespace(history=history, model=model, optimizer=optimizer, scheduler=scheduler)


def assert_same(a, b, where=""):
    """Equal to the last bit, but for the seconds that an epoch took."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds"}:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def saved(run_dir):
    """All that a run wrote: weights, optimizer, scheduler, average, history, kept weights."""
    folder = helpers.run_folder(run_dir)
    return {name: torch.load(folder / name, weights_only=True) for name in ("checkpoint.pt", "model.pth")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Function: the saved state of an undisturbed run of a plan (trained once)."""
    @functools.cache
    def state(plan):
        folder = tmp_path_factory.mktemp("undisturbed")
        train(folder, plan)
        return saved(folder)
    return state


def trained(capsys):
    """Numbers of the epochs that were trained and not loaded, from what was printed since the last time."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    return [int(line.split()[1].partition("/")[0]) for line in lines if not line.endswith("(loaded)")]


# ------------------------------------------------------------------------------------------------
# Device, seed, loader
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"),
                                                 (False, False, "cpu")])
def test_pick_device_takes_cuda_then_mps_then_cpu(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert helpers.pick_device().type == expected


@pytest.mark.parametrize("device, capability, expected", [
    ("cpu", None, None), ("mps", None, None), ("cuda", (7, 5), torch.float16), ("cuda", (8, 0), torch.bfloat16)])
def test_mixed_precision_only_on_cuda(monkeypatch, device, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert helpers.mixed_precision(torch.device(device)) is expected


def test_seed_everything_seeds_python_numpy_and_torch():
    def draw(seed):
        helpers.seed_everything(seed)
        return random.random(), float(np.random.rand()), torch.rand(3).tolist()
    first, again, other = draw(3), draw(3), draw(4)
    assert first == again and all(a != b for a, b in zip(first, other))


@settings(deadline=None, max_examples=30)
@given(indices=st.lists(st.integers(0, N - 1), min_size=1, unique=True), batch_size=st.integers(1, 30),
       shuffle=st.booleans())
def test_batch_loader_covers_every_exam_once(indices, batch_size, shuffle):
    targets = np.arange(N) / N  # names the exam
    loader = helpers.BatchLoader(exams()[0], targets, indices, batch_size, shuffle)
    batches = list(loader)
    assert len(batches) == len(loader) == math.ceil(len(indices) / batch_size)
    sizes = [len(x) for x, _ in batches]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1, "no small last batch"
    found = torch.cat([y for _, y in batches])
    assert found.shape == (len(indices), 1) and found.dtype == torch.float32
    order = (found[:, 0] * N).round().long()
    assert sorted(order.tolist()) == sorted(indices) and (shuffle or order.tolist() == indices)
    assert torch.equal(torch.cat([x for x, _ in batches]), exams()[0][order])


def test_batch_loader_shuffles_by_torch_random_state_and_shares_memory():
    traces, targets = exams()
    loader, other = (helpers.BatchLoader(traces, targets, part, 4, shuffle=True) for part in (TRAIN, VALID))

    def order(seed):
        torch.manual_seed(seed)
        return torch.cat([x for x, _ in loader])
    first = order(1)
    assert torch.equal(first, order(1)) and not torch.equal(first, order(2))
    assert not torch.equal(first, torch.cat([x for x, _ in loader])), "each epoch has its own order"
    assert loader.traces.data_ptr() == other.traces.data_ptr() == traces.data_ptr()


# ------------------------------------------------------------------------------------------------
# The loops
# ------------------------------------------------------------------------------------------------
def loaders(kind, batch_size):
    traces, targets = exams()
    if kind == "BatchLoader":
        return helpers.BatchLoader(traces, targets, np.arange(N), batch_size)
    return DataLoader(TensorDataset(traces, targets[:, None]), batch_size=batch_size)


@pytest.mark.parametrize("kind", ["BatchLoader", "DataLoader"])
@pytest.mark.parametrize("batch_size", [7, 23, 24])
def test_train_loop_is_a_plain_loop_with_the_mean_per_exam(kind, batch_size):
    model, (traces, targets) = Mean(), exams()
    plain = deepcopy(model)
    loss = helpers.train_loop(1, loaders(kind, batch_size), model, make_optimizer("SGD", model, 2.0),
                              torch.nn.BCEWithLogitsLoss(), "cpu")
    optimizer, losses = make_optimizer("SGD", plain, 2.0), []
    cut = (lambda x: x.tensor_split(math.ceil(N / batch_size))) if kind == "BatchLoader" else (lambda x: x.split(batch_size))
    for x, y in zip(cut(traces), cut(targets[:, None])):
        optimizer.zero_grad()
        mean = F.binary_cross_entropy_with_logits(plain(x), y)
        mean.backward()
        optimizer.step()
        losses.append((mean.item(), len(y)))
    assert isinstance(loss, float) and loss == pytest.approx(sum(m * n for m, n in losses) / N, rel=1e-6)
    if N % batch_size and kind == "DataLoader":
        assert loss != pytest.approx(np.mean([m for m, _ in losses]), rel=1e-4), "data do not tell the two means apart"
    assert_same(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("kind", ["BatchLoader", "DataLoader"])
@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_eval_loop_has_the_mean_per_exam_and_one_float64_sigmoid(kind, batch_size):
    logits = torch.linspace(-40, 36, N)
    traces, targets = exams()[0].clone(), exams()[1]
    traces[:, 0, 0] = logits
    loader = helpers.BatchLoader(traces, targets, np.arange(N), batch_size) if kind == "BatchLoader" \
        else DataLoader(TensorDataset(traces, targets[:, None]), batch_size=batch_size)
    loss, prob, truth = helpers.eval_loop(1, loader, FirstSample(), torch.nn.BCEWithLogitsLoss(), torch.device("cpu"))
    assert isinstance(loss, float)
    assert loss == pytest.approx(F.binary_cross_entropy_with_logits(logits, targets).item(), rel=1e-6)
    assert prob.shape == truth.shape == (N, 1) and prob.dtype == np.float64
    np.testing.assert_allclose(prob[:, 0], 1 / (1 + np.exp(-logits.double().numpy())), rtol=1e-14)
    assert len(np.unique(prob)) == N, "float32 ties the most certain exams"
    np.testing.assert_array_equal(truth[:, 0], targets)


def test_eval_loop_computes_no_gradients_and_changes_nothing():
    model = Net().train()
    before = deepcopy(model.state_dict())
    first, second = (helpers.eval_loop(1, loaders("BatchLoader", 7), model, torch.nn.BCEWithLogitsLoss(), "cpu")
                     for _ in range(2))
    np.testing.assert_array_equal(first[1], second[1])  # no dropout
    assert_same(model.state_dict(), before)  # no BatchNorm statistics
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and torch.is_grad_enabled()


def test_each_loop_sets_the_mode_it_needs():
    model, loader = FirstSample(), loaders("BatchLoader", 12)
    for _ in range(2):
        helpers.train_loop(1, loader, model, make_optimizer("SGD", model, 0.1), torch.nn.BCEWithLogitsLoss(), "cpu")
        helpers.eval_loop(1, loader, model, torch.nn.BCEWithLogitsLoss(), "cpu")
        model.train()
        helpers.predict(model, exams()[0], "cpu", batch_size=12)
        model.eval()
    assert model.calls == 2 * (2 * [(True, True, 12)] + 4 * [(False, False, 12)])


@pytest.mark.parametrize("max_norm", [None, 1e-3])
def test_gradient_is_clipped(max_norm):
    model = Mean()
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    helpers.train_loop(1, loaders("BatchLoader", N), model, make_optimizer("SGD", model, 1.0),
                       torch.nn.BCEWithLogitsLoss(), "cpu", max_norm=max_norm)
    moved = (torch.nn.utils.parameters_to_vector(model.parameters()) - before).norm().item()
    assert moved == pytest.approx(max_norm, rel=1e-2) if max_norm else moved > 1e-2


# ------------------------------------------------------------------------------------------------
# Prediction
# ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    array = exams()[0].numpy()
    with h5py.File(tmp_path_factory.mktemp("sources") / "exams.h5", "w") as file:
        file["tracings"] = array
        yield {"h5py": file["tracings"], "ndarray": array, "float64": array.astype(np.float64), "tensor": exams()[0]}


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(["h5py", "ndarray", "float64", "tensor"]), batch_size=st.integers(1, N + 5))
def test_predict_gives_the_same_logits_for_every_source_and_batch_size(sources, kind, batch_size):
    torch.manual_seed(0)
    model = Net()
    logits = helpers.predict(model, sources[kind], "cpu", batch_size=batch_size)
    assert logits.shape == (N,) and logits.dtype == np.float64
    with torch.no_grad():
        np.testing.assert_allclose(logits, model.eval()(exams()[0])[:, 0].numpy(), rtol=1e-5, atol=1e-6)


def test_predict_streams_and_gives_plain_logits():
    array = exams()[0].numpy().copy()
    array[:, 0, 0] = np.linspace(-50, 50, N)

    sizes = []

    class Source:
        def __len__(self):
            return N

        def __getitem__(self, part):
            sizes.append(len(array[part]))
            return array[part]

    logits = helpers.predict(FirstSample(), Source(), "cpu", batch_size=10)
    np.testing.assert_array_equal(logits, array[:, 0, 0].astype(np.float64))
    assert sizes == [10, 10, 4]


def test_predict_averages_over_shifts():
    model, array = Net(), exams()[0].numpy()
    alone = [helpers.predict(model, np.roll(array, shift, axis=1), "cpu") for shift in (0, 5, -7)]
    assert not np.allclose(alone[0], alone[1], atol=1e-5)
    averaged = helpers.predict(model, array, "cpu", shifts=(0, 5, -7))
    np.testing.assert_allclose(averaged, np.mean(alone, axis=0), atol=1e-6)


# ------------------------------------------------------------------------------------------------
# fit: numbers, history, kept weights, schedulers, average
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("plan", PLANS)
def test_same_seed_same_numbers_other_seed_others(tmp_path, undisturbed, plan):
    torch.rand(3)  # what was drawn before must not matter
    train(tmp_path / "again", plan)
    assert_same(saved(tmp_path / "again"), undisturbed(plan))
    other = train(tmp_path / "other", plan, seed=7).history
    assert other["train_loss"] != undisturbed(plan)["checkpoint.pt"]["history"]["train_loss"]


def test_history_is_a_plain_dict_of_lists(tmp_path):
    history = train(tmp_path).history
    assert type(history) is dict
    assert {"epoch", "lr", "train_loss", "valid_loss", "auroc", "ap", "f1", "accuracy", "seconds"} <= set(history)
    assert all(type(values) is list and len(values) == EPOCHS for values in history.values())
    assert all(type(value) in (int, float) for values in history.values() for value in values)
    assert history["epoch"] == [1, 2, 3, 4]
    assert json.loads(json.dumps(history, allow_nan=False)) == history
    assert json.loads((helpers.run_folder(tmp_path) / "history.json").read_text()) == history, "the file holds other numbers than the run"


def test_history_file_is_whole_and_strict_json_without_auroc(tmp_path):
    """A validation part of one class has no AUROC; browsers and other readers know no NaN."""
    traces, _ = exams()
    model = Mean()
    no_af = helpers.BatchLoader(traces, np.zeros(N), VALID, BATCH)
    history = helpers.fit(model, no_af, no_af, optimizer=make_optimizer("SGD", model, 0.1), epochs=2, device="cpu",
                          loss_function=torch.nn.BCEWithLogitsLoss(), run_dir=tmp_path)
    assert all(math.isnan(value) for value in history["auroc"])
    stored = json.loads((helpers.run_folder(tmp_path) / "history.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert stored["auroc"] == [None, None]


HISTORY = {"epoch": [1, 2, 3, 4], "valid_loss": [0.5, 0.3, 0.3, 0.6], "auroc": [math.nan, 0.6, 0.9, 0.7],
           "ap": [0.9, 0.6, 0.5, 0.7], "f1": [0.0, 0.0, 0.0, 0.1]}


@pytest.mark.parametrize("select, index", [("valid_loss", 1), ("auroc", 2), ("ap", 0), ("f1", 3), ("last", 3)])
def test_best_epoch(select, index):
    assert helpers.best_epoch(HISTORY, select) == index


@pytest.mark.parametrize("select", ["valid_loss", "auroc", "last"])
def test_fit_keeps_the_weights_of_the_best_epoch(tmp_path, select):
    traces, targets = exams()[0].clone(), exams()[1]
    traces[VALID, :, 0] -= targets[VALID, None]  # what helps in training misleads in validation
    run = train(tmp_path, "constant", net=Mean, lr=2.0, traces=traces, select=select, epochs=6)
    history = run.history
    best = {"valid_loss": np.argmin(history["valid_loss"]), "auroc": np.argmax(history["auroc"]), "last": 5}[select]
    assert select == "last" or best < 5, "the data do not tell best and last apart"
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.5]))
    loss, prob, truth = helpers.eval_loop(0, helpers.BatchLoader(traces, targets, VALID, BATCH), run.model, loss, "cpu")
    assert loss == history["valid_loss"][best]
    assert helpers.classification_metrics(truth, prob)["auroc"] == history["auroc"][best]
    assert_same(dict(run.model.state_dict()), dict(saved(tmp_path)["model.pth"]))


def test_plateau_scheduler_follows_the_validation_loss(tmp_path):
    run = train(tmp_path, "plateau", lr=0.2, epochs=8)
    dummy = make_optimizer("SGD", Mean(), 0.2)
    expected, scheduler = [], PLANS["plateau"][2](dummy)
    for loss in run.history["valid_loss"]:
        expected.append(dummy.param_groups[0]["lr"])
        scheduler.step(loss)
    assert run.history["lr"] == expected and min(expected) < 0.2
    assert run.optimizer.param_groups[0]["lr"] == dummy.param_groups[0]["lr"]


@pytest.mark.parametrize("plan, steps", [("one cycle, average", STEPS), ("each epoch", 1)])
def test_other_schedulers_step_each_batch_or_each_epoch(tmp_path, plan, steps):
    run = train(tmp_path, plan, epochs=EPOCHS)
    dummy = make_optimizer("AdamW", Mean(), PLANS[plan][1])
    rates, scheduler = [dummy.param_groups[0]["lr"]], PLANS[plan][2](dummy)
    rates[0] = dummy.param_groups[0]["lr"]
    for _ in range(EPOCHS * steps):
        dummy.step()
        scheduler.step()
        rates.append(dummy.param_groups[0]["lr"])
    assert run.history["lr"] == rates[:-1:steps]
    assert run.optimizer.param_groups[0]["lr"] == rates[-1]


def test_average_of_the_weights_is_validated_and_kept(tmp_path):
    traces, targets = exams()
    torch.manual_seed(0)
    model = Mean()
    plain, loss = deepcopy(model), torch.nn.BCEWithLogitsLoss()
    history = helpers.fit(model, helpers.BatchLoader(traces, targets, TRAIN, BATCH),
                          helpers.BatchLoader(traces, targets, VALID, BATCH), loss_function=loss, epochs=3,
                          optimizer=make_optimizer("SGD", model, 1.0), device="cpu", run_dir=tmp_path, ema_decay=0.9,
                          select="last")
    optimizer, average = make_optimizer("SGD", plain, 1.0), None
    for _ in range(3):
        for part in np.array_split(TRAIN, STEPS):
            optimizer.zero_grad()
            loss(plain(traces[part]), targets[part, None]).backward()
            optimizer.step()
            now = torch.nn.utils.parameters_to_vector(plain.parameters()).detach().clone()
            average = now if average is None else 0.9 * average + 0.1 * now
    kept = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(kept, average, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(kept, now, atol=1e-3)
    valid = F.binary_cross_entropy_with_logits(model(traces[VALID]), targets[VALID, None]).item()
    assert history["valid_loss"][-1] == pytest.approx(valid, rel=1e-5)


def test_augment_sees_training_batches_only(tmp_path):
    traces, seen = exams()[0].clone(), []
    traces[:, -1, -1] = torch.arange(N)
    train(tmp_path, traces=traces, augment=lambda x: (seen.append(x[:, -1, -1].int().tolist()), x)[1])
    assert [len(exam) for exam in seen] == EPOCHS * [5, 5, 4, 4]
    assert sorted(itertools.chain(*seen)) == sorted(EPOCHS * TRAIN.tolist())


def test_fit_takes_torch_data_loaders_and_resumes(tmp_path):
    data = TensorDataset(exams()[0][TRAIN], exams()[1][TRAIN, None])
    expected = train(tmp_path / "whole", train_loader=DataLoader(data, BATCH, shuffle=True)).history
    with pytest.raises(Stop):
        train(tmp_path / "cut", train_loader=DataLoader(data, BATCH, shuffle=True), stop=STEPS + 1)
    assert_same(train(tmp_path / "cut", train_loader=DataLoader(data, BATCH, shuffle=True)).history, expected)


@pytest.mark.parametrize("stop", [None, 5])
def test_random_state_of_the_caller_is_untouched(tmp_path, stop):
    def state():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()
    states = []

    def net():  # the last that `train` does before `fit` is to make the network
        model = Net()
        states.append(state())
        return model
    with suppress(Stop):
        train(tmp_path, net=net, augment=noise, stop=stop)
    assert states == [state()]


# ------------------------------------------------------------------------------------------------
# fit: finished runs, refused settings
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("plan", PLANS)
def test_finished_run_is_loaded_without_training(tmp_path, plan):
    first = train(tmp_path, plan)
    again = train(tmp_path, plan, stop=0)
    assert again.history == first.history
    assert_same(dict(again.model.state_dict()), dict(first.model.state_dict()))


@pytest.mark.parametrize("select", ["AUROC", "loss", "train_loss", "best", None])
def test_typing_errors_in_select_are_named_before_anything_is_trained_or_written(tmp_path, select):
    """What is allowed is named, too."""
    allowed = "it is 'valid_loss', 'last' or one of auroc, ap, f1, accuracy"
    with pytest.raises(ValueError, match=f"select={select!r} is not known: {allowed}"):
        train(tmp_path / "run", select=select, stop=0)
    assert not (tmp_path / "run").exists()


SCHEDULERS = torch.optim.lr_scheduler


@pytest.mark.parametrize("schedule", ["onecyle", "OneCycle", "", "cosine", 3])
def test_typing_errors_in_the_schedule_are_named_at_once(schedule):
    optimizer = torch.optim.SGD(Mean().parameters(), 0.1)
    with pytest.raises(ValueError, match=f"schedule={schedule!r} is not known: it is 'plateau', 'onecycle', None or a function"):
        helpers.make_scheduler(optimizer, schedule, 0.1, 20)


def test_schedules_by_name_or_function():
    optimizer = torch.optim.SGD(Mean().parameters(), 0.1)
    plateau, cycle, constant = (helpers.make_scheduler(optimizer, name, 0.1, 20) for name in ("plateau", "onecycle", None))
    assert isinstance(plateau, SCHEDULERS.ReduceLROnPlateau) and plateau.factor == 0.5 and constant is None
    assert isinstance(cycle, SCHEDULERS.OneCycleLR) and cycle.total_steps == 20
    own = helpers.make_scheduler(optimizer, lambda optimizer, steps: SCHEDULERS.CosineAnnealingLR(optimizer, steps), 0.1, 20)
    assert isinstance(own, SCHEDULERS.CosineAnnealingLR) and own.T_max == 20


@pytest.mark.parametrize("optimizer, device, fused", [
    (torch.optim.AdamW, "cuda", True), (functools.partial(torch.optim.Adam, eps=1e-6), "cuda", True),
    (torch.optim.RMSprop, "cuda", None), (lambda parameters, lr: torch.optim.SGD(parameters, lr), "cuda", None),
    (torch.optim.AdamW, "cpu", None)], ids=["AdamW", "partial", "RMSprop", "function", "CPU"])
def test_fused_only_for_optimisers_that_take_it(optimizer, device, fused):
    made = helpers.make_optimizer(optimizer, Mean(), device, lr=0.1)
    assert made.param_groups[0].get("fused") is fused and made.param_groups[0]["lr"] == 0.1


def test_weighted_loss_weighs_both_classes_alike():
    targets = np.array([1, 0, 0, 0, 0])
    loss = helpers.weighted_loss(targets)(torch.zeros(5, 1), torch.tensor(targets, dtype=torch.float32)[:, None])
    assert loss.item() == pytest.approx(2 * 4 / 5 * math.log(2)), "four times one exam, once each of four"
    assert helpers.weighted_loss(targets, weighted=False).pos_weight.item() == 1.0
    with pytest.raises(ValueError, match="none of the training exams has AF"):
        helpers.weighted_loss(np.zeros(5))


@pytest.mark.parametrize("schedule", [
    lambda o: SCHEDULERS.ReduceLROnPlateau(o), lambda o: SCHEDULERS.OneCycleLR(o, 0.1, total_steps=99),
    lambda o: SCHEDULERS.MultiStepLR(o, [1]), lambda o: SCHEDULERS.LambdaLR(o, lambda epoch: 1 / (epoch + 1)),
    lambda o: SCHEDULERS.CyclicLR(o, 0.01, 0.1),
    lambda o: SCHEDULERS.SequentialLR(o, [SCHEDULERS.ConstantLR(o), SCHEDULERS.ExponentialLR(o, 0.9)], [1]),
], ids=["ReduceLROnPlateau", "OneCycleLR", "MultiStepLR", "LambdaLR", "CyclicLR", "SequentialLR"])
def test_checkpoint_loads_with_weights_only_and_resumes(tmp_path, schedule):
    expected = train(tmp_path / "whole", schedule=schedule, ema_decay=0.9).history
    with pytest.raises(Stop):
        train(tmp_path / "cut", schedule=schedule, ema_decay=0.9, stop=2 * STEPS + 1)
    torch.load(helpers.run_folder(tmp_path / "cut") / "checkpoint.pt", weights_only=True)
    assert_same(train(tmp_path / "cut", schedule=schedule, ema_decay=0.9).history, expected)


# ------------------------------------------------------------------------------------------------
# Faults: kill, damage, full disk, NaN, Ctrl-C
# ------------------------------------------------------------------------------------------------
def attempt(folder, plan, kill=None, at=0, share=0.0):
    """Train, logging the epochs that are started, and die by SIGKILL at event `at` of the kind `kill`."""
    count, save, replace, started = itertools.count(), torch.save, os.replace, []

    def die(kind):
        if kind == kill and next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_batch():
        epoch = torch.initial_seed() - 1_000_003 * 42  # each epoch has its seed
        if epoch not in started:
            started.append(epoch)
            with open(f"{folder}.log", "a") as log:
                log.write(f"{os.getpid()} {epoch}\n")
        die("batch")

    def save_or_die(state, path):
        save(state, path)
        if kill == "save":  # a part of the file is written
            whole = Path(path).read_bytes()
            os.truncate(path, int(share * len(whole)))
            die("save")
            Path(path).write_bytes(whole)

    def replace_or_die(*args):
        die("before replace")
        replace(*args)
        die("after replace")

    torch.save, os.replace = save_or_die, replace_or_die
    train(folder, plan, before_batch=before_batch)


def kill_points(folder, seed, points):
    """Train again and again until `points` runs were killed at least once; report what was killed where."""
    rng, report = random.Random(seed), []
    kinds = itertools.cycle(["batch", "delay", "save", "before replace", "after replace"])

    def child(run, plan, **kill):
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                attempt(run, plan, **kill)
                code = 0
            except BaseException:
                traceback.print_exc()
                raise
            finally:  # not through pytest or the script's exit
                sys.stdout.flush()
                os._exit(code)
        return pid, start

    pid, start = child(os.path.join(folder, "timing"), "plateau")
    assert os.waitpid(pid, 0)[1] == 0
    takes, runs = time.monotonic() - start, 0
    while len(report) < points:
        plan = list(PLANS)[runs % 2]
        run, points_here = os.path.join(folder, f"run{runs}"), []
        runs += 1
        for _ in range(rng.choice([1, 1, 2])):  # several kills within one run count
            kind = next(kinds)
            # files that are renamed: the description, the checkpoints of each epoch, ...
            last = {"batch": 6 * EPOCHS, "save": EPOCHS, "delay": 1}.get(kind, 2 * EPOCHS + 1)
            pid, _ = child(run, plan, kill=kind, at=rng.randrange(last), share=rng.random())
            if kind == "delay":
                time.sleep(rng.random() * takes)
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), "the training failed"
            if status:
                points_here.append(kind)
        pid, _ = child(run, plan)
        assert os.waitpid(pid, 0)[1] == 0
        if points_here:
            report.append({"run": run, "plan": plan, "kills": points_here})
    Path(folder, "report.json").write_text(json.dumps(report))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_twenty_kills_end_with_the_numbers_of_an_undisturbed_run(tmp_path, undisturbed):
    """Each script imports everything once, then forks a process for each attempt: a start takes no seconds."""
    seed = random.randrange(10**6)
    folders = [str(Path(module.__file__).parent) for module in (helpers, sys.modules[__name__])]
    scripts, report = [], []
    for half in (tmp_path / "0", tmp_path / "1"):  # ten points each, at the same time
        half.mkdir()
        text = (f"import sys\nsys.path[:0] = {folders}\n"
                "import torch, torch._dynamo  # else each fork imports it\ntorch.set_num_threads(1)\n"
                f"import {Path(__file__).stem} as tests\ntests.kill_points({str(half)!r}, {seed + int(half.name)}, 10)\n")
        scripts.append(subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        text=True))
    for half, script in enumerate(scripts):
        out, _ = script.communicate(timeout=240)
        assert script.returncode == 0, f"seed {seed}\n{out[-5000:]}"
        report += json.loads((tmp_path / str(half) / "report.json").read_text())
    kills = [kind for run in report for kind in run["kills"]]
    assert len(report) == 20 <= len(kills) and {"batch", "save", "before replace", "after replace"} <= set(kills)
    for run in report:
        assert_same(saved(run["run"]), undisturbed(run["plan"]), f"seed {seed}, {run}")
        attempts = [line.split() for line in Path(run["run"] + ".log").read_text().splitlines()]
        for (pid, epoch), (next_pid, next_epoch) in itertools.pairwise(attempts):
            lost = int(next_epoch) < int(epoch) if pid != next_pid else int(next_epoch) != int(epoch) + 1
            assert not lost, f"seed {seed}, {run}: epoch {next_epoch} was trained after epoch {epoch}"


@settings(deadline=None, max_examples=15)
@given(plan=st.sampled_from(["plateau", "one cycle, average"]),
       stops=st.lists(st.integers(0, EPOCHS * STEPS), min_size=1, max_size=3))
def test_resume_at_any_batch_equals_an_undisturbed_run(undisturbed, plan, stops):
    with tempfile.TemporaryDirectory() as folder:
        for stop in [*stops, None]:
            with suppress(Stop):
                train(folder, plan, stop=stop)
        assert_same(saved(folder), undisturbed(plan))


def cut_run(run_dir):
    """A run that stopped in the middle of epoch 4; its checkpoint."""
    with pytest.raises(Stop):
        train(run_dir, stop=3 * STEPS + 1)
    return helpers.run_folder(run_dir) / "checkpoint.pt"


def spoil(file, damage):
    """Damage a checkpoint: its bytes, or its content in a file that is whole."""
    if damage in DAMAGE:
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
        return
    state = torch.load(file, weights_only=True)
    if damage == "a part is missing":
        del state["optimizer"]
    elif damage == "weights of another shape":
        state["model"]["6.weight"] = torch.zeros(2, 6)
    elif damage == "kept weights without a key":
        del state["best"]["6.weight"]
    torch.save(state, file)


@pytest.mark.parametrize("damage", [*DAMAGE, "a part is missing", "weights of another shape", "kept weights without a key"])
def test_damaged_checkpoint_is_named_and_the_run_starts_again(tmp_path, capsys, undisturbed, damage):
    checkpoint = cut_run(tmp_path)
    spoil(checkpoint, damage)
    capsys.readouterr()
    train(tmp_path)
    out = capsys.readouterr().out
    assert f"{checkpoint} is damaged" in out and "(loaded)" not in out
    assert checkpoint.with_suffix(".damaged").exists(), "nothing is deleted"
    assert_same(saved(tmp_path), undisturbed("plateau"))


def test_kill_in_the_write_of_a_checkpoint_keeps_the_one_before(tmp_path, monkeypatch, capsys, undisturbed):
    checkpoint = cut_run(tmp_path)
    with monkeypatch.context() as patch:
        real = os.replace

        def replace(source, target):
            if Path(target) == checkpoint:
                raise Stop
            return real(source, target)
        patch.setattr(os, "replace", replace)
        with pytest.raises(Stop):
            train(tmp_path)
    capsys.readouterr()
    train(tmp_path)
    assert trained(capsys) == [4], "epochs 1 to 3 are loaded"
    assert_same(saved(tmp_path), undisturbed("plateau"))


def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch, capsys, undisturbed):
    with monkeypatch.context() as patch:
        real, count = torch.save, itertools.count(1)

        def save(state, path):
            if next(count) == 3:
                Path(path).write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            real(state, path)
        patch.setattr(torch, "save", save)
        with pytest.raises(OSError, match="No space left"):
            train(tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    capsys.readouterr()
    train(tmp_path)
    assert trained(capsys) == [3, 4]
    assert_same(saved(tmp_path), undisturbed("plateau"))


# ------------------------------------------------------------------------------------------------
# Faults: what is wrong in the student's code is named
# ------------------------------------------------------------------------------------------------
class Log(Mean):
    def forward(self, traces):
        return super().forward(traces).log()


def bad_now_and_then(traces):
    return traces / (torch.rand(len(traces), 1, 1) > 0.05)


def own_loss(logits, targets):
    return -(targets * logits.sigmoid().sub(2).log()).mean()


def exam_with_nan(exam):
    traces = exams()[0].clone()
    traces[exam, 5, 0] = math.nan
    return traces


@pytest.mark.parametrize("changes, message", [
    ({"lr": 1e30, "weight_decay": 1.0}, r"training loss is (nan|inf) in epoch [12] at learning rate 1e\+30: the weights grew "
                                        r"beyond all bounds \(linear\.weight.*lower the learning rate or clip"),
    ({"traces": exam_with_nan(TRAIN[3])}, r"training loss is nan in epoch 1 .* in batch \d the tracings hold it"),
    ({"traces": exam_with_nan(VALID[2])}, r"validation loss is nan in epoch 1 .* in batch 1 the tracings hold it"),
    ({"net": Log}, r"training loss is nan in epoch 1 .* in batch 1 the forward pass makes it, with finite weights"),
    ({"augment": bad_now_and_then}, r"in batch \d the augmentation makes it of finite tracings"),
    ({"loss_function": own_loss}, r"in batch 1 the loss function makes it of finite logits"),
], ids=["diverged", "training exam", "validation exam", "forward pass", "augmentation", "loss"])
def test_loss_that_is_not_finite_stops_the_training_and_the_cause_is_named(tmp_path, changes, message):
    """A high learning rate is told apart from the rest, and no checkpoint is promised where there is none."""
    with pytest.raises(FloatingPointError, match=message) as caught:
        train(tmp_path, "constant", **{"net": Mean, **changes})
    assert "checkpoint" not in str(caught.value)
    assert "lr" in changes or "lower the learning rate" not in str(caught.value)
    assert not (helpers.run_folder(tmp_path) / "model.pth").exists()


def test_saturated_probabilities_give_no_hint_and_no_warning(capsys):
    """A logit beyond 17 is a probability of exactly 1 in float32: no hint, and no warning of NumPy's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for probability in ([0.5, 1.0], [0.0, 0.6]):
            helpers.hint_at_sigmoid(np.array(probability)[:, None])
    assert not capsys.readouterr().out


def test_a_sigmoid_in_the_model_is_named(tmp_path, capsys):
    def probabilities():
        return torch.nn.Sequential(Net(), torch.nn.Sigmoid())
    train(tmp_path / "run", "constant", net=probabilities, epochs=2)
    assert "All logits lie between 0 and 1: is there a sigmoid in the model?" in capsys.readouterr().out
    train(tmp_path / "run", "constant")
    assert "a sigmoid in the model" not in capsys.readouterr().out


WRONG_LOGITS = {  # what is returned -> (how it is named, made from the logits (batch, 1))
    "two columns": (r"\(5, 2\)", lambda logits: logits.expand(-1, 2)),
    "no column": (r"\(5,\)", lambda logits: logits[:, 0]),
    "a tuple": ("tuple", lambda logits: (logits, logits)),
    "nothing": ("NoneType", lambda logits: None),
}


@pytest.mark.parametrize("what", WRONG_LOGITS)
def test_wrong_shape_of_the_logits_is_named(tmp_path, what):
    """Got and wanted; others would be broadcast to (batch, batch) without a word."""
    got, make = WRONG_LOGITS[what]

    class Wrong(Mean):
        def forward(self, traces):
            return make(super().forward(traces))
    with pytest.raises(ValueError, match=rf"returned {got} for 5 exams, wanted a tensor of shape \(5, 1\)"):
        train(tmp_path, net=Wrong)
    with pytest.raises(ValueError, match=r"wanted a tensor of shape \(24, 1\)"):
        helpers.predict(Wrong(), exams()[0], "cpu", batch_size=N)


def test_targets_without_their_column_are_named():
    """A plain DataLoader and an own loss: logits (5, 1) less targets (5,) would be a table of 25 without a word."""
    batches = [(exams()[0][:5], torch.zeros(5))]

    def square(logits, targets):
        return (logits - targets).square().mean()
    model = Net()
    with pytest.raises(ValueError, match=r"targets of shape \(5,\), wanted \(5, 1\)"):
        helpers.train_loop(1, batches, model, torch.optim.SGD(model.parameters(), lr=0.1), square, "cpu")
    with pytest.raises(ValueError, match=r"targets of shape \(5,\), wanted \(5, 1\)"):
        helpers.eval_loop(1, batches, model, square, "cpu")


@pytest.mark.parametrize("select", ["valid_loss", "last"])
def test_nan_leaves_the_best_weights_and_goes_on(tmp_path, select):
    best = train(tmp_path / "two", "constant", epochs=2, select=select).model
    made, count = [], itertools.count()

    def fault(traces):
        return traces if next(count) < 2 * STEPS + 2 else traces * math.nan
    with pytest.raises(FloatingPointError, match="epoch 3 "):
        train(tmp_path / "cut", "constant", select=select, augment=fault, net=lambda: made.append(Net()) or made[-1])
    assert_same(dict(made[0].state_dict()), dict(best.state_dict()))


@pytest.mark.parametrize("select", ["valid_loss", "last"])
def test_interrupting_says_how_to_go_on_and_leaves_the_best_weights(tmp_path, capsys, undisturbed, select):
    best, made = train(tmp_path / "two", "constant", epochs=2, select=select).model, []
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", "constant", select=select, stop=2 * STEPS + 2, error=KeyboardInterrupt,
              net=lambda: made.append(Net()) or made[-1])
    assert capsys.readouterr().out.endswith("stopped after epoch 2 of 4: run the cell again to continue.\n")
    assert_same(dict(made[0].state_dict()), dict(best.state_dict()))
    train(tmp_path / "cut", "constant", select=select)
    assert trained(capsys) == [3, 4]
    if select == "valid_loss":
        assert_same(saved(tmp_path / "cut"), undisturbed("constant"))
