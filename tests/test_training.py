"""Training: the loops, prediction, `fit`, and what kills and damage may not do to it."""
import functools
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import ecg_helpers as helpers

N, EPOCHS = 24, 4
TRAIN, VALID = np.arange(18), np.arange(18, N)
STEPS = 4 * EPOCHS  # four batches of four exams in an epoch
BCE = torch.nn.BCEWithLogitsLoss()


# ---- A tiny data set, tiny networks, one training ----
@functools.cache
def exams():
    """24 random tracings (24, 64, 8) and targets; half of the exams carry a hint of their class."""
    targets = (torch.arange(N) % 3 == 0).float()
    traces = torch.randn(N, 64, 8, generator=torch.Generator().manual_seed(1))
    traces[::2, :, 0] += 0.5 * targets[::2, None]
    return traces, targets


class Mean(torch.nn.Module):
    """Mean of each lead, then a linear layer: no random numbers, no buffers. Notes how it was called."""

    def __init__(self):
        super().__init__()
        self.linear, self.modes = torch.nn.Linear(8, 1), []

    def forward(self, traces):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.linear(traces.mean(dim=1))


class FirstSample(torch.nn.Module):
    """The logit is the first sample of the first lead."""

    def forward(self, traces):
        return traces[:, 0, :1]


def make_net():
    """BatchNorm and dropout: buffers and random numbers that a resume must restore."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(512, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(),
                               torch.nn.Dropout(0.3), torch.nn.Linear(6, 1))


def train(run_dir, net=make_net, **changes):
    """One small run of `fit`: its history and the model. `changes` go to `fit`."""
    torch.manual_seed(0)
    model = net()
    arguments = {"traces": exams()[0], "targets": exams()[1].numpy(), "train_exams": TRAIN, "valid_exams": VALID,
                 "epochs": EPOCHS, "lr": 0.01, "device": "cpu", "run_dir": run_dir, "batch_size": 4, **changes}
    return helpers.fit(model, **arguments), model


def checkpoint(run_dir):
    return next(run_dir.glob("*/run.pt"))


def assert_same(a, b):
    """Equal to the last bit, but for the seconds that an epoch took."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            assert_same(a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Stop(BaseException):
    """Ends a training where it stands."""


def train_until(epoch, run_dir, **changes):
    """A run that stops in the second batch of this epoch. torch's own functions are no part of a run's name."""
    real, calls = torch.optim.Adam.zero_grad, []

    def zero_grad(optimizer):
        calls.append(1)
        if len(calls) == (epoch - 1) * STEPS // EPOCHS + 2:
            raise Stop
        return real(optimizer)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(torch.optim.Adam, "zero_grad", zero_grad)
        train(run_dir, **changes)


# ---- The loops ----
def loader(traces, targets, batch_size):
    return DataLoader(TensorDataset(traces, targets), batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [7, 23, 24])
def test_unequal_batches_have_the_mean_loss_per_exam(batch_size):
    traces, targets = exams()
    model = Mean()
    whole = F.binary_cross_entropy_with_logits(model(traces)[:, 0], targets).item()
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    model.modes.clear()
    batches = loader(traces, targets[:, None], batch_size)
    assert helpers.train_loop(1, batches, model, frozen, BCE, "cpu") == pytest.approx(whole, rel=1e-6)
    assert set(model.modes) == {(True, True)}
    model.modes.clear()
    assert helpers.eval_loop(1, batches, model, BCE, "cpu")[0] == pytest.approx(whole, rel=1e-6)
    assert set(model.modes) == {(False, False)}


def test_train_loop_takes_the_steps_of_a_plain_loop():
    traces, targets = exams()
    model, losses, lr = Mean(), [], 0.5
    weight, bias = model.linear.weight[0].detach().double(), model.linear.bias.detach().double()
    optimizer = torch.optim.SGD(model.parameters(), lr)
    loss = helpers.train_loop(1, loader(traces, targets, 10), model, optimizer, BCE, "cpu")
    for x, y in zip(traces.double().mean(dim=1).split(10), targets.double().split(10)):
        logits = x @ weight + bias
        losses.append(F.binary_cross_entropy_with_logits(logits, y, reduction="sum"))
        slope = (logits.sigmoid() - y) / len(y)
        weight, bias = weight - lr * slope @ x, bias - lr * slope.sum()
    assert loss == pytest.approx(sum(losses).item() / N, abs=1e-6)
    found = torch.cat([model.linear.weight[0], model.linear.bias]).double()
    assert torch.allclose(found, torch.cat([weight, bias]), rtol=0, atol=1e-6)


def test_float64_traces_and_integer_targets_just_work():
    traces, targets = exams()
    losses = []
    for batches in (loader(traces, targets, 8), loader(traces.double(), targets.long(), 8)):
        torch.manual_seed(0)
        model = Mean()
        losses.append(helpers.train_loop(1, batches, model, torch.optim.SGD(model.parameters()), BCE, "cpu"))
        losses.append(helpers.eval_loop(1, batches, model, BCE, "cpu")[0])
    assert losses[:2] == losses[2:]


def test_probabilities_are_float64_and_not_saturated():
    logits = torch.linspace(-40, 36, N)
    traces, targets = exams()[0].clone(), exams()[1]
    traces[:, 0, 0] = logits
    _, p, truth = helpers.eval_loop(1, loader(traces, targets, 5), FirstSample(), BCE, "cpu")
    assert p.shape == truth.shape == (N, 1) and p.dtype == np.float64 and (np.diff(p[:, 0]) > 0).all()
    np.testing.assert_allclose(p[:, 0], 1 / (1 + np.exp(-logits.double().numpy())), rtol=1e-14)


def test_predict_takes_files_arrays_and_tensors_and_averages_shifts(tmp_path):
    traces, model = exams()[0], FirstSample()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["tracings"] = traces.numpy()
        found = [helpers.predict(model, x, "cpu", batch_size=5) for x in (file["tracings"], traces.numpy(), traces)]
    assert all(logits.dtype == np.float64 and np.array_equal(logits, traces[:, 0, 0].numpy()) for logits in found)
    shifted = helpers.predict(model, traces, "cpu", shifts=(0, 1, -2))
    np.testing.assert_allclose(shifted, traces[:, [0, -1, 2], 0].mean(dim=1), atol=1e-6)


@pytest.mark.parametrize("spoil", [lambda logits: logits.expand(-1, 2), lambda logits: logits[:, 0],
                                   lambda logits: (logits, logits), lambda logits: None],
                         ids=["two columns", "no column", "tuple", "nothing"])
def test_a_model_that_returns_no_column_of_logits_is_refused(spoil):
    class Wrong(Mean):
        def forward(self, traces):
            return spoil(super().forward(traces))
    model, batches = Wrong(), loader(*exams(), 5)
    for call in (lambda: helpers.train_loop(1, batches, model, torch.optim.SGD(model.parameters()), BCE, "cpu"),
                 lambda: helpers.predict(model, exams()[0], "cpu", batch_size=5)):
        with pytest.raises(ValueError, match=r"model must return logits of shape \(5, 1\)"):
            call()


@pytest.mark.parametrize("batch", [(exams()[0], torch.ones(N), exams()[1]), exams()[0], {"x": exams()[0]}],
                         ids=["three", "traces alone", "dict"])
def test_a_batch_that_is_no_pair_is_refused(batch):
    with pytest.raises(ValueError, match="a batch must be a pair"):
        helpers.eval_loop(1, [batch], Mean(), BCE, "cpu")


# ---- fit: history, kept weights, exams ----
def test_history_is_lists_of_pythons_numbers_and_the_checkpoint_is_safe(tmp_path, capsys):
    history, model = train(tmp_path)
    names = {"lr", "train_loss", "valid_loss", "auroc", "ap", "f1", "accuracy", "seconds"}
    assert names | {"epoch"} == history.keys() and history["epoch"] == [1, 2, 3, 4]
    assert all(type(value) is float for name in names for value in history[name])
    state = torch.load(checkpoint(tmp_path), weights_only=True)
    assert state["finished"] and state["history"] == history
    assert_same(dict(model.state_dict()), state["best"])
    before = checkpoint(tmp_path).stat().st_mtime_ns
    again, other = train(tmp_path)
    assert again == history and checkpoint(tmp_path).stat().st_mtime_ns == before
    assert "loaded" in capsys.readouterr().out
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("select", ["valid_loss", "auroc", "last"])
def test_the_kept_weights_are_those_of_the_selected_epoch(tmp_path, select):
    history, model = train(tmp_path, select=select, lr=0.05)
    values = {"valid_loss": -np.array(history["valid_loss"]), "auroc": history["auroc"], "last": history["epoch"]}
    loss_function = helpers.weighted_loss(exams()[1].numpy()[TRAIN])
    loss = helpers.eval_loop(1, helpers.make_loader(*exams(), VALID), model, loss_function, "cpu")[0]
    assert loss == pytest.approx(history["valid_loss"][np.argmax(values[select])], rel=1e-6)


def test_averaged_weights_are_validated_and_kept(tmp_path):
    plain, last = train(tmp_path / "plain", net=Mean, select="last")
    history, model = train(tmp_path / "averaged", net=Mean, select="last", ema_decay=0.9)
    assert history["train_loss"] == plain["train_loss"] and history["valid_loss"] != plain["valid_loss"]
    torch.manual_seed(0)
    start, kept, end = (net.linear.weight for net in (Mean(), model, last))
    assert 0 < torch.dist(start, kept) < torch.dist(start, end), "the average lags behind"


def test_repeated_positions_oversample(tmp_path):
    seen = [y[:, 0].tolist() for _, y in helpers.make_loader(exams()[0], np.arange(N), [0, 0, 5, 7], 3)]
    assert seen == [[0, 0, 5], [7]]
    plain, alone, both = (train(tmp_path, net=Mean, train_exams=exams, lr=1e-9, epochs=1, loss_function=BCE)[0]
                          for exams in ([0, 1, 2, 3], [0, 0, 0, 0], [0, 1, 2, 3, 0, 0, 0, 0]))
    expected = (plain["train_loss"][0] + alone["train_loss"][0]) / 2
    assert both["train_loss"][0] == pytest.approx(expected, rel=1e-6)


def test_targets_of_a_table_are_taken_and_a_mask_for_positions_is_refused(tmp_path):
    assert train(tmp_path, targets=pd.Series(exams()[1].numpy()))[0] == train(tmp_path)[0]
    with pytest.raises(ValueError, match="positions"):
        train(tmp_path, train_exams=np.arange(N) < 18)


# ---- fit: schedulers ----
def warm_up(optimizer, steps):
    return lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / (steps // 2)))


def one_cycle(optimizer, steps):
    return lr_scheduler.OneCycleLR(optimizer, np.logspace(-2, -1, 3)[1], total_steps=steps)


@pytest.mark.parametrize("schedule", [warm_up, one_cycle])
def test_a_scheduler_steps_after_each_batch(tmp_path, schedule):
    history, _ = train(tmp_path, scheduler=schedule)
    optimizer, rates = torch.optim.SGD([torch.zeros(1)], lr=0.01), []
    scheduler = schedule(optimizer, STEPS)
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert history["lr"] == pytest.approx(rates[::STEPS // EPOCHS])


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_plateau_steps_once_an_epoch_with_the_loss_or_the_auroc(tmp_path, mode):
    def plateau(optimizer, steps):
        return lr_scheduler.ReduceLROnPlateau(optimizer, mode, factor=0.5, patience=0)
    history, _ = train(tmp_path, scheduler=plateau, epochs=8, lr=0.05)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.05)
    scheduler, rates = plateau(optimizer, STEPS), []
    for value in history["auroc" if mode == "max" else "valid_loss"]:
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(value)
    assert history["lr"] == rates and rates[-1] < rates[0]


@pytest.mark.parametrize("changes", [{"lr": np.logspace(-3, -1, 3)[1]}, {"scheduler": one_cycle}], ids=["lr", "max_lr"])
def test_numbers_of_numpy_leave_a_checkpoint_that_loads(tmp_path, changes):
    train_until(3, tmp_path, **changes)
    assert len(torch.load(checkpoint(tmp_path), weights_only=True)["history"]["lr"]) == 2
    history, _ = train(tmp_path, **changes)
    assert_same(history, train(tmp_path / "whole", **changes)[0])


# ---- fit: kills and damage ----
SCRIPT = """
import os, random, signal, sys
import numpy as np, torch, torch._dynamo
sys.path[:0] = {folders}
import ecg_helpers as helpers
torch.set_num_threads(1)

def augment(traces):
    noise = torch.as_tensor(np.random.normal(size=tuple(traces.shape))).float()
    return traces * random.uniform(0.8, 1.2) + 0.1 * noise + 0.1 * torch.randn_like(traces)

def train(run_dir, kill=None, at=0):
    calls = []
    def dying(real, name):
        def wrapped(*arguments, **keywords):
            calls.append(name)
            if (name, calls.count(name)) == (kill, at):
                if name == "save":
                    open(arguments[1], "wb").write(b"a part")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **keywords)
        return wrapped
    torch.save, os.replace = dying(torch.save, "save"), dying(os.replace, "replace")
    torch.optim.AdamW.step = dying(torch.optim.AdamW.step, "step")
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.BatchNorm1d(512), torch.nn.Dropout(0.3), torch.nn.Linear(512, 1)
    traces = torch.randn(24, 64, 8, generator=torch.Generator().manual_seed(1))
    helpers.fit(torch.nn.Sequential(*layers), traces, np.arange(24) % 3 == 0, np.arange(18), np.arange(18, 24),
                epochs=6, lr=0.01, batch_size=4, device="cpu", run_dir=run_dir, augment=augment, ema_decay=0.8,
                optimizer=torch.optim.AdamW,
                scheduler=lambda o, steps: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=steps))

for run_dir, kill, at in {attempts}:
    child = os.fork()
    if child == 0:
        train(run_dir, kill, at)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert killed == (-signal.SIGKILL if kill else 0), killed
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills forked processes")
def test_a_killed_run_ends_with_the_numbers_of_an_undisturbed_one(tmp_path):
    """Kills within a batch, while a checkpoint is written and before it is renamed; the rest in another process."""
    cut, whole = str(tmp_path / "cut"), str(tmp_path / "whole")
    attempts = [[(cut, "step", 2), (cut, "step", 7), (cut, "save", 2), (cut, "replace", 3)],
                [(cut, None, 0), (whole, None, 0)]]
    for part in attempts:
        text = SCRIPT.format(folders=[str(Path(helpers.__file__).parent)], attempts=part)
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("cut: epoch") == 6 - 4, "four epochs were kept"
    assert_same(*(torch.load(checkpoint(Path(folder)), weights_only=True) for folder in (cut, whole)))


@pytest.mark.parametrize("damage", ["truncated", "empty", "bit flip"])
def test_a_damaged_checkpoint_is_named_and_the_run_starts_again(tmp_path, capsys, damage):
    train_until(3, tmp_path / "run")
    file = checkpoint(tmp_path / "run")
    data = bytearray(file.read_bytes())
    data[data.index(torch.load(file)["best"]["1.weight"].numpy().tobytes())] ^= 8
    file.write_bytes({"truncated": data[:len(data) // 2], "empty": b"", "bit flip": data}[damage])
    capsys.readouterr()
    history, _ = train(tmp_path / "run")
    said = capsys.readouterr().out
    assert f"{file} is damaged" in said and said.count("run: epoch") == EPOCHS
    assert_same(history, train(tmp_path / "whole")[0])


# ---- fit: what is wrong in a student's code is named ----
def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    with pytest.raises(FloatingPointError, match="not finite in epoch 1 .* sqrt"):
        train(tmp_path, augment=lambda traces: traces / 0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_that_is_no_mean_is_refused(tmp_path, reduction):
    with pytest.raises(ValueError, match="mean"):
        train(tmp_path, loss_function=torch.nn.BCEWithLogitsLoss(reduction=reduction))


def test_an_augmentation_may_return_float64(tmp_path):
    train(tmp_path, augment=lambda traces: traces * torch.as_tensor(np.random.uniform(0.9, 1.1, (len(traces), 1, 1))))


@pytest.mark.parametrize("last, scale, bias, hint", [
    (torch.nn.Sigmoid(), 40.0, 0.0, True), (torch.nn.Sigmoid(), 0.1, 0.0, False), (torch.nn.Tanh(), 5.0, 0.0, False),
    (torch.nn.Identity(), 0.3, 0.6, False), (torch.nn.Identity(), 5.0, 0.5, False)],
    ids=["sigmoid", "untrained", "tanh", "biased", "unbounded"])
def test_a_sigmoid_in_the_model_is_named_and_nothing_else_taken_for_one(tmp_path, capsys, last, scale, bias, hint):
    """Of networks that have learned: logits around `bias`, of this spread, through a last layer."""

    def learned():
        net = Mean()
        net.linear.weight.data = torch.eye(1, 8) * scale
        net.linear.bias.data.fill_(bias)
        return torch.nn.Sequential(net, last)
    train(tmp_path / "run", net=learned, lr=1e-6, epochs=2)
    assert ("sigmoid" in capsys.readouterr().out) == hint
