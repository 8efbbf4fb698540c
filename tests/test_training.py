"""Training: the loops, prediction, `fit`, and what kills, damage and changed settings may not do to it."""
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
from contextlib import contextmanager, suppress
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


def train(run_dir, plan="plateau", *, start=0, net=Net, lr=None, weight_decay=0.0, pos_weight=1.5, schedule=None,
          traces=None, train_loader=None, **changes):
    """One small run of `fit`: history, model, optimizer and scheduler. `changes` go to `fit`."""
    kind, rate, planned, arguments = PLANS[plan]
    torch.manual_seed(start)
    model = net()
    optimizer = make_optimizer(kind, model, lr or rate, weight_decay)
    schedule = schedule or planned
    scheduler = schedule(optimizer) if schedule else None
    everything, targets = exams()
    traces = everything if traces is None else traces
    arguments = {"epochs": EPOCHS, "loss_function": torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([pos_weight])),
                 "settings": {"data": "tiny"}, **arguments, **changes}
    history = helpers.fit(model, train_loader or helpers.BatchLoader(traces, targets, TRAIN, BATCH, shuffle=True),
                          helpers.BatchLoader(traces, targets, VALID, BATCH), optimizer=optimizer,
                          scheduler=scheduler, device="cpu", run_dir=run_dir, **arguments)
    return SimpleNamespace(history=history, model=model, optimizer=optimizer, scheduler=scheduler)


class Stop(BaseException):
    """Ends a training where it stands, as a kill does."""


@contextmanager
def stopped(after, error=Stop):
    """Let `error` rise in the training batch of `Net` after `after` whole ones."""
    forward, count = Net.forward, itertools.count()

    def stopping(self, traces):
        if self.training and next(count) == after:
            raise error
        return forward(self, traces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Net, "forward", stopping)
        yield


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
    return {name: torch.load(Path(run_dir) / name, weights_only=True) for name in ("checkpoint.pt", "model.pth")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Function: the saved state of an undisturbed run of a plan (trained once)."""
    @functools.cache
    def state(plan):
        folder = tmp_path_factory.mktemp("undisturbed")
        train(folder, plan)
        return saved(folder)
    return state


def epochs_trained(monkeypatch):
    """List that collects the number of each epoch that `fit` really trains."""
    trained, real = [], helpers.train_loop
    monkeypatch.setattr(helpers, "train_loop", lambda epoch, *a, **k: (trained.append(epoch), real(epoch, *a, **k))[1])
    return trained


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
    assert json.loads((tmp_path / "history.json").read_text()) == history, "the file holds other numbers than the run"


def test_history_file_is_whole_and_strict_json_without_auroc(tmp_path):
    """A validation part of one class has no AUROC; browsers and other readers know no NaN."""
    traces, _ = exams()
    model = Mean()
    no_af = helpers.BatchLoader(traces, np.zeros(N), VALID, BATCH)
    history = helpers.fit(model, no_af, no_af, optimizer=make_optimizer("SGD", model, 0.1), epochs=2, device="cpu",
                          loss_function=torch.nn.BCEWithLogitsLoss(), run_dir=tmp_path)
    assert all(math.isnan(value) for value in history["auroc"])
    stored = json.loads((tmp_path / "history.json").read_text(), parse_constant=lambda name: pytest.fail(name))
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
    assert_same(dict(run.model.state_dict()), dict(torch.load(tmp_path / "model.pth", weights_only=True)))


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
    with stopped(STEPS + 1), pytest.raises(Stop):
        train(tmp_path / "cut", train_loader=DataLoader(data, BATCH, shuffle=True))
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
    with stopped(stop), suppress(Stop):
        train(tmp_path, net=net, augment=noise)
    assert states == [state()]


# ------------------------------------------------------------------------------------------------
# fit: finished runs, changed settings
# ------------------------------------------------------------------------------------------------
class Forbidden:
    def __len__(self):
        return STEPS

    def __iter__(self):
        raise AssertionError("a finished run was trained again")


@pytest.mark.parametrize("plan", PLANS)
def test_finished_run_is_loaded_without_training(tmp_path, plan):
    first = train(tmp_path, plan)
    again = train(tmp_path, plan, train_loader=Forbidden())
    assert again.history == first.history
    assert_same(dict(again.model.state_dict()), dict(first.model.state_dict()))


def test_overwrite_trains_anew(tmp_path, monkeypatch):
    first, trained = train(tmp_path), epochs_trained(monkeypatch)
    again = train(tmp_path, overwrite=True)
    assert trained == [1, 2, 3, 4]
    assert_same(again.history, first.history)


SCHEDULERS = torch.optim.lr_scheduler
CHANGES = {
    "epochs": {"epochs": EPOCHS + 1},
    "learning rate": {"lr": 0.03},
    "weight decay": {"weight_decay": 0.1},
    "seed": {"seed": 7},
    "pos_weight": {"pos_weight": 3.0},
    "caller's settings": {"settings": {"data": "other"}},
    "further setting": {"settings": {"data": "tiny", "batch_size": 16}},
    "start weights": {"start": 9},
    "architecture": {"net": Mean},
    "average": {"ema_decay": 0.5},
    "criterion": {"select": "auroc"},
    "clipping": {"max_norm": 0.1},
    "augmentation": {"augment": noise},
    "scheduler": {"schedule": lambda o: SCHEDULERS.StepLR(o, 1)},
    "its patience": {"schedule": lambda o: SCHEDULERS.ReduceLROnPlateau(o, factor=0.5, patience=9)},
    "loss function": {"loss_function": F.binary_cross_entropy_with_logits},
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_settings_start_anew_and_say_so(tmp_path, monkeypatch, capsys, what):
    train(tmp_path / "run")
    trained = epochs_trained(monkeypatch)
    capsys.readouterr()
    run = train(tmp_path / "run", **CHANGES[what])
    assert "anew" in capsys.readouterr().out
    assert trained == run.history["epoch"]
    assert_same(run.history, train(tmp_path / "fresh", **CHANGES[what]).history)


@pytest.mark.parametrize("schedule, changed", [
    (lambda o: SCHEDULERS.OneCycleLR(o, 0.05, total_steps=99), lambda o: SCHEDULERS.OneCycleLR(o, 0.5, total_steps=99)),
    (lambda o: SCHEDULERS.MultiStepLR(o, [1, 3]), lambda o: SCHEDULERS.MultiStepLR(o, [2])),
    (lambda o: SCHEDULERS.ExponentialLR(o, 0.9), lambda o: SCHEDULERS.ExponentialLR(o, 0.5)),
    (lambda o: SCHEDULERS.CosineAnnealingLR(o, 4), lambda o: SCHEDULERS.CosineAnnealingLR(o, 8)),
], ids=["OneCycleLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingLR"])
def test_changed_schedule_starts_anew(tmp_path, monkeypatch, schedule, changed):
    trained = epochs_trained(monkeypatch)
    train(tmp_path, schedule=schedule, epochs=2)
    train(tmp_path, schedule=schedule, epochs=2)
    train(tmp_path, schedule=changed, epochs=2)
    assert trained == [1, 2, 1, 2]


def test_changed_rate_of_a_parameter_group_starts_anew(tmp_path, monkeypatch):
    trained, (traces, targets) = epochs_trained(monkeypatch), exams()
    for rate in (0.1, 0.5):
        torch.manual_seed(0)
        model, loader = Mean(), helpers.BatchLoader(traces, targets, TRAIN, BATCH)
        optimizer = torch.optim.SGD([{"params": model.parameters(), "lr": rate}], lr=1.0)
        helpers.fit(model, loader, loader, optimizer=optimizer, loss_function=torch.nn.BCEWithLogitsLoss(), epochs=1,
                    device="cpu", run_dir=tmp_path)
    assert trained == [1, 1]


def test_caller_names_settings_freely(tmp_path, capsys):
    train(tmp_path, settings={"model": "CNN", "epochs": "all", "lr": (1, 2)}, epochs=1)
    train(tmp_path, settings={"model": "CNN", "epochs": "all", "lr": (1, 2)}, epochs=1, train_loader=Forbidden())
    capsys.readouterr()
    train(tmp_path, settings={"model": "RNN", "epochs": "all", "lr": (1, 2)}, epochs=1)
    out = capsys.readouterr().out
    assert "anew" in out and "model" in out


def test_plain_loss_function_resumes_in_another_process(tmp_path):
    """A function's address differs from process to process: it must not be part of what a run is."""
    def fresh():
        def loss(logits, targets):
            return F.binary_cross_entropy_with_logits(logits, targets)
        return loss
    keep = [fresh(), fresh()]  # two addresses, one function
    train(tmp_path, loss_function=keep[0])
    train(tmp_path, loss_function=keep[1], train_loader=Forbidden())


@pytest.mark.parametrize("schedule", [
    lambda o: SCHEDULERS.ReduceLROnPlateau(o), lambda o: SCHEDULERS.OneCycleLR(o, 0.1, total_steps=99),
    lambda o: SCHEDULERS.MultiStepLR(o, [1]), lambda o: SCHEDULERS.LambdaLR(o, lambda epoch: 1 / (epoch + 1)),
    lambda o: SCHEDULERS.CyclicLR(o, 0.01, 0.1),
    lambda o: SCHEDULERS.SequentialLR(o, [SCHEDULERS.ConstantLR(o), SCHEDULERS.ExponentialLR(o, 0.9)], [1]),
], ids=["ReduceLROnPlateau", "OneCycleLR", "MultiStepLR", "LambdaLR", "CyclicLR", "SequentialLR"])
def test_checkpoint_loads_with_weights_only_and_resumes(tmp_path, schedule):
    expected = train(tmp_path / "whole", schedule=schedule, ema_decay=0.9).history
    with stopped(2 * STEPS + 1), pytest.raises(Stop):
        train(tmp_path / "cut", schedule=schedule, ema_decay=0.9)
    torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    assert_same(train(tmp_path / "cut", schedule=schedule, ema_decay=0.9).history, expected)


# ------------------------------------------------------------------------------------------------
# Faults: kill, damage, full disk, NaN, Ctrl-C
# ------------------------------------------------------------------------------------------------
def attempt(folder, plan, kill=None, at=0, share=0.0):
    """Train, logging the epochs that are started, and die by SIGKILL at event `at` of the kind `kill`."""
    count, loop, forward, save, replace = itertools.count(), helpers.train_loop, Net.forward, torch.save, os.replace

    def die(kind):
        if kind == kill and next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def logged_loop(epoch, *args, **kwargs):
        with open(f"{folder}.log", "a") as log:
            log.write(f"{os.getpid()} {epoch}\n")
        return loop(epoch, *args, **kwargs)

    def forward_or_die(self, traces):
        die("batch")
        return forward(self, traces)

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

    helpers.train_loop, Net.forward, torch.save, os.replace = logged_loop, forward_or_die, save_or_die, replace_or_die
    train(folder, plan)


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
            last = {"batch": 6 * EPOCHS, "save": EPOCHS, "delay": 1}.get(kind, 2 * EPOCHS - 1)
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
    """The script imports everything once, then forks a process for each attempt: a start takes no seconds."""
    seed = random.randrange(10**6)
    script = tmp_path / "kills.py"
    folders = [str(Path(module.__file__).parent) for module in (helpers, sys.modules[__name__])]
    script.write_text(f"import sys\nsys.path[:0] = {folders}\n"
                      "import torch, torch._dynamo  # else each fork imports it\ntorch.set_num_threads(1)\n"
                      f"import {Path(__file__).stem} as tests\ntests.kill_points({str(tmp_path)!r}, {seed}, 20)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"seed {seed}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    report = json.loads((tmp_path / "report.json").read_text())
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
            with stopped(stop), suppress(Stop):
                train(folder, plan)
        assert_same(saved(folder), undisturbed(plan))


def cut_run(folder):
    """A run that stopped in the middle of epoch 4; its checkpoints, newest first."""
    with stopped(3 * STEPS + 1), pytest.raises(Stop):
        train(folder)
    newest = folder / "checkpoint.pt"
    return [newest, *(set(folder.glob("checkpoint*.pt")) - {newest})]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path, monkeypatch, capsys, undisturbed, damage):
    newest = cut_run(tmp_path)[0]
    newest.write_bytes(DAMAGE[damage](newest.read_bytes()))
    trained = epochs_trained(monkeypatch)
    capsys.readouterr()
    train(tmp_path)
    out = capsys.readouterr().out
    assert str(newest) in out and "damaged" in out
    assert trained == [3, 4]
    assert_same(saved(tmp_path), undisturbed("plateau"))


def test_all_checkpoints_damaged_starts_anew(tmp_path, monkeypatch, capsys, undisturbed):
    files = cut_run(tmp_path)
    assert len(files) == 2
    for file in files:
        file.write_bytes(DAMAGE["truncated"](file.read_bytes()))
    trained = epochs_trained(monkeypatch)
    capsys.readouterr()
    train(tmp_path)
    out = capsys.readouterr().out
    assert all(str(file) in out for file in files)
    assert trained == [1, 2, 3, 4]
    assert_same(saved(tmp_path), undisturbed("plateau"))


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_kill_in_the_write_after_damage_loses_at_most_one_epoch(tmp_path, monkeypatch, undisturbed, moves):
    """The damaged newest checkpoint must not push out the good one before it."""
    newest = cut_run(tmp_path)[0]
    newest.write_bytes(DAMAGE["truncated"](newest.read_bytes()))
    with monkeypatch.context() as patch:
        real, count = os.replace, itertools.count()

        def replace(*args):
            if "checkpoint" in str(args[0]) and next(count) >= moves:
                raise Stop
            return real(*args)
        patch.setattr(os, "replace", replace)
        with pytest.raises(Stop):
            train(tmp_path)
    trained = epochs_trained(monkeypatch)
    train(tmp_path)
    assert trained[0] >= 3, "all progress is lost"
    assert_same(saved(tmp_path), undisturbed("plateau"))


def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch, undisturbed):
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
    assert not list(tmp_path.glob("*.part"))
    trained = epochs_trained(monkeypatch)
    train(tmp_path)
    assert trained == [3, 4]
    assert_same(saved(tmp_path), undisturbed("plateau"))


@pytest.mark.parametrize("lr, exam, message", [
    (1e30, None, r"training loss is (nan|inf).* epoch [12] .*1e\+30.*linear\.weight"),
    (0.02, TRAIN[3], r"training loss is nan .*epoch 1 .*0\.02"),
    (0.02, VALID[2], r"validation loss is nan .*epoch 1 .*0\.02.*weights are still finite.*input"),
], ids=["diverged", "training exam", "validation exam"])
def test_loss_that_is_not_finite_stops_the_training(tmp_path, lr, exam, message):
    traces = exams()[0].clone()
    if exam is not None:
        traces[exam, 5, 0] = math.nan
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path, "constant", net=Mean, lr=lr, traces=traces, weight_decay=1.0)
    assert not (tmp_path / "model.pth").exists()


@pytest.mark.parametrize("error, match", [(FloatingPointError, "epoch 3 "), (KeyboardInterrupt, None)])
@pytest.mark.parametrize("select", ["valid_loss", "last"])
def test_nan_and_interrupt_leave_the_best_weights_and_go_on(tmp_path, error, match, select):
    best = train(tmp_path / "two", "constant", epochs=2, select=select).model
    made, count = [], itertools.count()

    def fault(traces):
        if next(count) < 2 * STEPS + 2:
            return traces
        if error is KeyboardInterrupt:
            raise KeyboardInterrupt
        return traces * math.nan
    with pytest.raises(error, match=match):
        train(tmp_path / "cut", "constant", select=select, augment=fault, net=lambda: made.append(Net()) or made[-1])
    assert_same(dict(made[0].state_dict()), dict(best.state_dict()))
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["history"]["epoch"] == [1, 2]
