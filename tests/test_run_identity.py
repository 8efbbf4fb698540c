"""What a run is: everything its result depends on, and nothing else. Another identity is another folder."""
import ast
import functools
import importlib.util
import io
import itertools
import json
import linecache
import math
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import ecg_helpers as helpers

MODULE = Path(helpers.__file__)
N, SAMPLES = 24, 64
TRAIN, VALID = np.arange(18), np.arange(18, N)
SCHEDULES = torch.optim.lr_scheduler

# A student's cells. Every edit below changes one text in them.
CELLS = '''
"""A network and its augmentation."""
import functools
from dataclasses import dataclass
import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

GAIN, TABLE, WEIGHTS = 0.3, pd.DataFrame({"lead": ["I", "II"], "gain": [1.0, 0.5]}), np.linspace(0, 1, 64)
NAMES = np.array(["I", "II"], dtype=object)
traces = "a global that the functions below only seem to use"


def twice(function):
    @functools.wraps(function)
    def repeated(x):
        return function(function(x))
    return repeated


@dataclass
class Config:
    width: int = 4
    drop: float = 0.25


class Layer(torch.nn.Module):
    """A base class."""

    SCALE = 2.0
    activation = torch.nn.ReLU

    @staticmethod
    def bent(x):
        return x.clamp(-3, 3)

    @property
    def half(self):
        return 0.5

    def pooled(self, x):
        return x.amax(dim=1)  # over time


class Net(Layer):
    """The network."""

    def __init__(self, normalize=True, config=Config()):
        super().__init__()
        self._normalize, self.config, self.function = normalize, config, F.relu
        self.identity = torch.nn.Identity()  # also the name of a method of loaders
        self.linear, self.act, self.last = torch.nn.Linear(8, 4), self.activation(), torch.nn.Linear(4, 1)

    def forward(self, traces: torch.Tensor):
        """Logits of a batch."""
        x = traces / traces.abs().amax((1, 2), keepdim=True) if self._normalize else traces
        x = self.bent(self.pooled(x)) * self.SCALE * self.half
        return self.last(self.act(self.linear(x)))


def gain(x):
    return x * (1 + GAIN * torch.cos(x.sum((1, 2), keepdim=True)))


def countdown(x, n):  # calls itself
    return x if n == 0 else countdown(0.9 * x, n - 1)


@twice
def sway(x):
    weights = torch.as_tensor(WEIGHTS, dtype=x.dtype)[None, :, None]
    return x + 0.01 * weights * TABLE["gain"].iloc[1] * len(NAMES)


def drift(amount):
    def inner(x):
        return x + amount
    return inner


def augment(x, strength=0.1):
    """Change a batch of tracings."""
    def shifted(x):
        return x.roll(5, dims=1)
    x = shifted(sway(gain(countdown(x, 2))))
    return drifts[1](x) * (1 + strength)


class Augmenter:
    def __init__(self, strength):
        self._strength = strength

    def __call__(self, x):
        return x * self._strength

    def apply(self, x):
        return x + self._strength


drifts = [drift(0.1), drift(0.2)]
half, double = (lambda x: x * 0.5), (lambda x: x * 2.0)
'''


def load_cells(*texts, number=itertools.count()):
    """Run `texts` as a notebook does: in module __main__, the source known to linecache, no such file."""
    space = {"__name__": "__main__"}
    for text in texts:
        file = f"<cell {next(number)}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        exec(compile(text, file, "exec", dont_inherit=True), space)
    return SimpleNamespace(**space)


@functools.cache
def exams():
    """24 random tracings (24, 64, 8) and targets."""
    traces = torch.randn(N, SAMPLES, 8, generator=torch.Generator().manual_seed(1))
    return traces, (torch.arange(N) % 3 == 0).float()


@functools.cache
def cells():
    return load_cells(CELLS)


def train(run_dir, cells=None, *, net=None, start=0, traces=None, targets=None, parts=(TRAIN, VALID), batch=6, lr=0.02,
          optimizer=torch.optim.AdamW, schedule=SCHEDULES.ReduceLROnPlateau, prepare=lambda model, optimizer: None,
          loader=None, fit=helpers.fit, **changes):
    """One epoch of the student's network: the history, and what was printed. `changes` go to `fit`."""
    cells = cells or globals()["cells"]()
    traces, targets = exams()[0] if traces is None else traces, exams()[1] if targets is None else targets
    torch.manual_seed(start)
    model = (net or cells.Net)()
    optimizer = optimizer(model.parameters(), lr=lr)
    prepare(model, optimizer)
    scheduler = schedule(optimizer) if schedule else None
    arguments = {"epochs": 1, "loss_function": torch.nn.BCEWithLogitsLoss(), "settings": {"data": "tiny"}, **changes}
    with redirect_stdout(io.StringIO()) as out:
        history = fit(model, loader or helpers.BatchLoader(traces, targets, parts[0], batch, shuffle=True),
                      helpers.BatchLoader(traces, targets, parts[1], batch), optimizer=optimizer, scheduler=scheduler,
                      device="cpu", run_dir=run_dir, **arguments)
    return SimpleNamespace(history=history, said=out.getvalue(), model=model, folder=helpers.run_folder(run_dir))


def trained(run):
    """Numbers of the epochs that were trained and not loaded."""
    lines = [line for line in run.said.splitlines() if line.startswith("epoch ") and not line.endswith("(loaded)")]
    return [int(line.split()[1].partition("/")[0]) for line in lines]


def assert_three_runs(folder, first, second, named=""):
    """A, B, A under one name: the second is another run and says how, the third is the first again."""
    a = train(folder, **first)
    files = {path.name: path.read_bytes() for path in a.folder.iterdir()}
    b = train(folder, **second)
    assert trained(b) == b.history["epoch"], "the old result was shown for another run"
    assert all((a.folder / name).read_bytes() == content for name, content in files.items())
    assert a.folder != b.folder and a.folder.parent == b.folder.parent
    assert f"another run than {a.folder.name}, which is kept" in b.said and named in b.said, b.said
    again = train(folder, **first)
    assert not trained(again) and again.history == a.history and again.folder == a.folder
    for key, value in a.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key])


# ------------------------------------------------------------------------------------------------
# Code of the model and of the augmentation
# ------------------------------------------------------------------------------------------------
EDITS = {  # what is edited: (the text, what it becomes, what the message names)
    "pooling": ("x.amax(dim=1)  #", "x.mean(dim=1)  #", "code of Layer.pooled"),
    "normalisation": ("if self._normalize else traces", "if not self._normalize else traces", "code of Net.forward"),
    "class attribute": ("SCALE = 2.0", "SCALE = 2.1", "code of Layer"),
    "class as class attribute": ("activation = torch.nn.ReLU", "activation = torch.nn.Tanh", "model act type"),
    "static method": ("clamp(-3, 3)", "clamp(-3, 2)", "code of Layer.bent"),
    "property": ("return 0.5", "return 0.6", "code of Layer.half"),
    "default of a network": ("normalize=True", "normalize=False", "model _normalize"),
    "default of its configuration": ("drop: float = 0.25", "drop: float = 0.35", "code of Config"),
    "function as attribute": ("config, F.relu", "config, F.gelu", "model function"),
    "constant": ("GAIN, TABLE, WEIGHTS = 0.3", "GAIN, TABLE, WEIGHTS = 0.4", "code of gain"),
    "table": ("[1.0, 0.5]", "[1.0, 0.6]", "code of sway"),
    "array": ("np.linspace(0, 1, 64)", "np.linspace(0, 2, 64)", "values of augmentation"),
    "array of objects": ('["I", "II"], dtype=object', '["I", "III"], dtype=object', "code of sway"),
    "called function": ("torch.cos(x", "torch.sin(x", "code of gain"),
    "recursive function": ("0.9 * x", "0.8 * x", "code of countdown"),
    "decorator": ("function(function(x))", "function(x)", "code of sway"),
    "decorated function": ("0.01 * weights", "0.02 * weights", "code of sway"),
    "nested function": ("x.roll(5, dims=1)", "x.roll(6, dims=1)", "code of augment"),
    "default of the augmentation": ("strength=0.1", "strength=0.2", "code of augment"),
    "closure in a list": ("drift(0.2)", "drift(0.3)", "code of drift"),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_of_the_code_is_another_run_and_undoing_it_finds_the_first(tmp_path, what):
    old, new, named = EDITS[what]
    assert CELLS.count(old) == 1
    edited = load_cells(CELLS.replace(old, new))
    first = {"cells": cells(), "augment": cells().augment}
    assert_three_runs(tmp_path, first, {"cells": edited, "augment": edited.augment}, named)


HARMLESS = {
    "comment": ("  # over time", "  # over all samples"),
    "docstring": ('"""Logits of a batch."""', '"""One logit per exam."""'),
    "no docstring": ('    """Change a batch of tracings."""\n', ""),
    "layout": ("x * (1 + GAIN * torch.cos(x.sum((1, 2), keepdim=True)))",
               "(\n        x * (1 + GAIN * torch.cos(\n            x.sum((1, 2), keepdim=True))))"),
    "annotations": ("def augment(x, strength=0.1):", "def augment(x: 'a batch', strength: float = 0.1) -> list:\n    n: int\n"),
    "annotated variable": ("    weights = torch", "    weights: object = torch"),
    "lines above": ("GAIN, TABLE", "\n\n\nunused = 1\n\n\ndef unused_too(x):\n    return x\n\n\nGAIN, TABLE"),
    "a global of a local's name": ('traces = "a global', 'traces = "another global'),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_comments_docstrings_annotations_and_layout_change_no_run(tmp_path, what):
    old, new = HARMLESS[what]
    assert CELLS.count(old) == 1
    train(tmp_path, augment=cells().augment)
    edited = load_cells(CELLS.replace(old, new))
    assert not trained(train(tmp_path, edited, augment=edited.augment))


ARGUMENTS = {  # two augmentations of one code, and two networks: what only their arguments tell apart
    "partial": lambda c: [{"augment": functools.partial(c.augment, strength=s)} for s in (0.1, 0.2)],
    "closure": lambda c: [{"augment": drift} for drift in c.drifts],
    "lambdas of one line": lambda c: [{"augment": c.half}, {"augment": c.double}],
    "object": lambda c: [{"augment": c.Augmenter(s)} for s in (0.9, 1.1)],
    "bound method": lambda c: [{"augment": c.Augmenter(s).apply} for s in (0.9, 1.1)],
    "None": lambda c: [{"augment": None}, {"augment": c.gain}],
    "AFNet() and AFNet(normalize=False)": lambda c: [{"net": c.Net}, {"net": lambda: c.Net(normalize=False)}],
    "dropout": lambda c: [{"net": lambda p=p: torch.nn.Sequential(torch.nn.Dropout(p), c.Net())} for p in (0.1, 0.2)],
    "heads of attention": lambda c: [
        {"net": lambda h=h: torch.nn.Sequential(torch.nn.TransformerEncoderLayer(8, h, 4, batch_first=True), c.Net())}
        for h in (2, 4)],
    "frozen layer": lambda c: [{}, {"prepare": lambda model, _: model.linear.requires_grad_(False)}],
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_other_arguments_are_another_run(tmp_path, what):
    assert_three_runs(tmp_path, *ARGUMENTS[what](cells()))


def test_source_that_nobody_knows_is_told_apart_by_its_bytecode(tmp_path):
    """Code of `exec` without a file, and without a module's name."""
    functions = []
    for name, constant in itertools.product(({"__name__": "__main__"}, {}), (0.3, 0.3, 0.5)):
        space = dict(name)
        exec(f"def shift(x):\n    return x + {constant} * (1 if x.ndim in {{3, 4}} else 2)", space)
        functions.append(space["shift"])
    assert [bool(trained(train(tmp_path, augment=function))) for function in functions] == [True, False, True] + 3 * [False]


def test_a_file_that_changed_after_it_was_loaded_is_named(tmp_path, monkeypatch):
    """The old code runs on: its result must not pass for one of the new file."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "own_augmentation.py"
    file.write_text("def change(x):\n    return x * 1.1\n")
    import own_augmentation
    first = train(tmp_path / "run", augment=own_augmentation.change)
    file.write_text("# a line above\n\n\ndef change(x):\n    return x * 1.1\n")
    assert train(tmp_path / "run", augment=own_augmentation.change).said.count("\n") == 1, "only moved"
    file.write_text("def change(x):\n    return x * 1.2  # longer\n")
    stale = train(tmp_path / "run", augment=own_augmentation.change)
    assert "Changed after it was loaded: change in own_augmentation.py. Restart the kernel" in stale.said
    importlib.reload(own_augmentation)
    fresh = train(tmp_path / "run", augment=own_augmentation.change)
    assert "Restart" not in fresh.said and trained(fresh) == [1]
    assert fresh.folder not in (first.folder, stale.folder)


def test_functions_of_an_own_module_count_by_module_and_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_filters.py").write_text("def smooth(x):\n    return 0.9 * x\n\n\ndef unused(x):\n    return x\n")
    import own_filters
    text = "import own_filters\n\n\ndef change(x):\n    return own_filters.smooth(x)\n"
    change = load_cells(text).change
    train(tmp_path / "run", augment=change)
    monkeypatch.setattr(own_filters, "unused", None)
    assert not trained(train(tmp_path / "run", augment=change))
    monkeypatch.setattr(own_filters, "smooth", cells().half)
    assert trained(train(tmp_path / "run", augment=change))


# ------------------------------------------------------------------------------------------------
# Loops and loss
# ------------------------------------------------------------------------------------------------
def edited_module(folder, *edits):
    """A copy of ecg_helpers with edits, loaded from its own file."""
    text = MODULE.read_text(encoding="utf-8")
    for old, new in edits:
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    folder.mkdir()
    (folder / "ecg_helpers.py").write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("ecg_helpers", folder / "ecg_helpers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def copied_module(tmp_path_factory):
    return edited_module(tmp_path_factory.mktemp("copy") / "module")


@pytest.mark.parametrize("what, old, new, other", [
    ("train_loop", "loss_sum += loss.detach() * len(targets)", "loss_sum += 2 * loss.detach() * len(targets)", True),
    ("forward", "    return logits.float()", "    return 2 * logits.float()", True),
    ("eval_loop", "logits_all.append(logits)", "logits_all.append(2 * logits)", True),
    ("to_probability", "return expit(np.asarray(logits", "return expit(1.01 * np.asarray(logits", True),
    ("best_epoch", "np.nanargmin(values) if", "np.nanargmax(values) if", True),
    ("a comment", "        # 3. backward\n", "        # 3. gradients\n\n", False),
    ("printing", "  AUROC {history[", "  auroc {history[", False),
    ("preprocessing", "def preprocess_ecg(signal, ", "def preprocess_ecg(signal_in_mv, ", False),
])
def test_an_edit_of_the_loops_is_another_run(tmp_path, copied_module, what, old, new, other):
    """A copy of the module that lies elsewhere is the same run, an edited one is another."""
    edited = edited_module(tmp_path / "module", (old, new))
    train(tmp_path / "run")
    assert not trained(train(tmp_path / "run", fit=copied_module.fit))
    run = train(tmp_path / "run", fit=edited.fit)
    assert bool(trained(run)) == other
    assert not other or f"code of {what}" in run.said
    assert not trained(train(tmp_path / "run"))


LOSS = "import torch\n\n\ndef loss(logits, targets):\n    return (logits - targets).{0}.mean()\n"


def test_a_loss_counts_by_its_code_and_its_weights(tmp_path):
    square, same, size = (load_cells(LOSS.format(name)).loss for name in ("square()", "square()", "abs()"))
    train(tmp_path, loss_function=square)
    assert not trained(train(tmp_path, loss_function=same)), "another address, the same function"
    for other in (size, torch.nn.BCEWithLogitsLoss(), torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0])),
                  torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0])), torch.nn.functional.mse_loss):
        assert trained(train(tmp_path, loss_function=other))
        assert not trained(train(tmp_path, loss_function=other))


# ------------------------------------------------------------------------------------------------
# Data and settings
# ------------------------------------------------------------------------------------------------
def swapped(indices):
    """As many exams with the same sum: two of them exchanged for their neighbours."""
    changed = indices.copy()
    changed[[0, 1]] = changed[0] - 1, changed[1] + 1
    return changed


PLAIN = {"net": functools.partial(cells().Net, normalize=False)}
INNER = np.arange(1, 18, 2)
OPTIM = torch.optim
SETTINGS = {  # (first, second, what the message names)
    "labels flipped": ({}, {"targets": 1 - exams()[1]}, "exams targets"),
    "one label": ({}, {"targets": exams()[1].index_fill(0, torch.tensor([3]), 0.0)}, "training exams targets"),
    "tracings zero": (PLAIN, {**PLAIN, "traces": torch.zeros_like(exams()[0])}, "values of training exams, values of validation"),
    "tracings inverted": ({}, {"traces": -exams()[0]}, "values of training exams"),
    "leads exchanged": ({}, {"traces": exams()[0].flip(2)}, "values of training exams"),
    "preprocessing, records": ({}, {"settings": {"data": "other"}}, "setting data (other instead of tiny)"),
    "further setting": ({}, {"settings": {"data": "tiny", "note": 1}}, "setting note (1 instead of None)"),
    "training exams": ({"parts": (INNER, VALID)}, {"parts": (swapped(INNER), VALID)}, "training exams"),
    "order of exams": ({}, {"parts": (TRAIN[::-1].copy(), VALID)}, "training exams"),
    "validation exams": ({}, {"parts": (TRAIN, VALID[1:])}, "validation exams"),
    "batch size": ({}, {"batch": 9}, "training exams batch size (9 instead of 6)"),
    "seed": ({}, {"seed": 7}, "seed (7 instead of 42)"),
    "starting weights": ({}, {"start": 9}, "other starting weights: was the seed set?"),
    "epochs": ({"epochs": 3}, {"epochs": 1}, "epochs (1 instead of 3)"),
    "learning rate": ({}, {"lr": 0.03}, "optimiser group 1 lr (0.03 instead of 0.02)"),
    "optimiser": ({}, {"optimizer": OPTIM.Adam}, "optimiser"),
    "weight decay": ({}, {"optimizer": functools.partial(OPTIM.AdamW, weight_decay=0.1)},
                     "weight_decay (0.1 instead of 0.01)"),
    "groups of parameters": (
        {"optimizer": lambda p, lr: OPTIM.SGD([{"params": [w], "lr": 0.01 * (w.ndim == 2)} for w in p], lr)},
        {"optimizer": lambda p, lr: OPTIM.SGD([{"params": [w], "lr": 0.01 * (w.ndim == 1)} for w in p], lr)},
        "optimiser"),
    "schedule": ({}, {"schedule": None}, "schedule"),
    "its patience": ({}, {"schedule": lambda o: SCHEDULES.ReduceLROnPlateau(o, patience=3)},
                     "schedule patience (3 instead of 10)"),
    "its smallest rate": ({}, {"schedule": lambda o: SCHEDULES.ReduceLROnPlateau(o, min_lr=0.01)}, "schedule min_lrs"),
    "average": ({}, {"ema_decay": 0.5}, "ema_decay (0.5 instead of None)"),
    "criterion": ({}, {"select": "auroc"}, "select (auroc instead of valid_loss)"),
    "clipping": ({}, {"max_norm": 0.1}, "max_norm (0.1 instead of None)"),
    "prevalence": ({}, {"prevalence": 0.5}, "prevalence (0.5 instead of None)"),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_other_data_and_settings_are_another_run(tmp_path, what):
    assert_three_runs(tmp_path, *SETTINGS[what])


SCHEDULE_PAIRS = {
    "OneCycleLR, rate": [lambda o, rate=rate: SCHEDULES.OneCycleLR(o, rate, total_steps=99) for rate in (0.05, 0.5)],
    "OneCycleLR, rise": [
        lambda o, rise=rise: SCHEDULES.OneCycleLR(o, 0.1, total_steps=99, pct_start=rise) for rise in (0.2, 0.3)],
    "OneCycleLR, shape": [
        lambda o, by=by: SCHEDULES.OneCycleLR(o, 0.1, total_steps=99, anneal_strategy=by) for by in ("cos", "linear")],
    "MultiStepLR": [lambda o, steps=steps: SCHEDULES.MultiStepLR(o, steps) for steps in ([1, 3], [2])],
    "ExponentialLR": [lambda o, gamma=gamma: SCHEDULES.ExponentialLR(o, gamma) for gamma in (0.9, 0.5)],
    "CosineAnnealingLR": [lambda o, n=n: SCHEDULES.CosineAnnealingLR(o, n) for n in (4, 8)],
    "LambdaLR": [lambda o: SCHEDULES.LambdaLR(o, cells().half), lambda o: SCHEDULES.LambdaLR(o, cells().double)],
    "SequentialLR": [lambda o, gamma=gamma: SCHEDULES.SequentialLR(
        o, [SCHEDULES.ConstantLR(o), SCHEDULES.ExponentialLR(o, gamma)], [1]) for gamma in (0.9, 0.5)],
    "its milestone": [lambda o, at=at: SCHEDULES.SequentialLR(
        o, [SCHEDULES.ConstantLR(o), SCHEDULES.ExponentialLR(o, 0.9)], [at]) for at in (1, 2)],
}


@pytest.mark.parametrize("pair", SCHEDULE_PAIRS)
def test_each_setting_of_a_schedule_counts(tmp_path, pair):
    first, second = SCHEDULE_PAIRS[pair]
    assert_three_runs(tmp_path, {"schedule": first}, {"schedule": second})


def test_a_torch_data_loader_counts_by_its_data_and_batches(tmp_path):
    def loader(batch=6, shift=0.0, sampler=None, **changes):
        data = TensorDataset(exams()[0][TRAIN] + shift, exams()[1][TRAIN, None])
        return DataLoader(data, batch, sampler=sampler and WeightedRandomSampler(sampler, 18), **changes)
    variants = [{}, {"batch": 9}, {"shift": 0.1}, {"shuffle": True}, {"sampler": [1.0] * 18}, {"sampler": [1.0] * 9 + [2.0] * 9}]
    for variant in variants:
        assert trained(train(tmp_path, loader=loader(**variant))) == [1], variant
    assert not any(trained(train(tmp_path, loader=loader(**variant))) for variant in variants)
    assert not trained(train(tmp_path, loader=loader(pin_memory=False, num_workers=0, timeout=0)))


# ------------------------------------------------------------------------------------------------
# What does not count
# ------------------------------------------------------------------------------------------------
def test_device_precision_and_switches_for_speed_change_no_run(tmp_path):
    """A run finished on a GPU loads on a laptop, with an older or newer torch."""
    first = train(tmp_path, prepare=lambda _, o: o.param_groups[0].update(fused=True, capturable=True, foreach=None))
    assert trained(first) == [1]

    def newer_torch(model, optimizer):
        optimizer.param_groups[0].update(fused=None, foreach=False, a_switch_of_a_newer_version=False)
        model.linear.another_switch = None
    for change in ({"amp_dtype": torch.bfloat16}, {"prepare": newer_torch}, {"overwrite": False}):
        assert not trained(train(tmp_path, **change)), change


def test_device_and_types_are_no_part_of_the_description():
    def described(device, kind):
        notes = helpers.Notes()
        thing = SimpleNamespace(device=torch.device(device), kind=kind, weights=torch.ones(3, dtype=kind))
        return helpers.describe(thing, notes), notes.numbers
    assert described("cpu", torch.float32) == described("cuda", torch.bfloat16)


@pytest.mark.parametrize("change, other", [(1e-7, False), (1e-3, True)])
def test_last_bits_of_weights_and_tracings_change_no_run(tmp_path, change, other):
    """Two machines draw and filter alike to the last bit or two."""
    def nearly(tensor):
        generator = torch.Generator().manual_seed(5)
        return tensor * (1 + change * torch.randn(tensor.shape, generator=generator).clamp(-1, 1))

    def prepare(model, optimizer):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(nearly(parameter))
    for near in ({"traces": nearly(exams()[0])}, {"prepare": prepare}):
        train(tmp_path)
        assert bool(trained(train(tmp_path, **near))) == other


def test_nan_in_tracings_is_part_of_the_run(tmp_path):
    """The second attempt must fail as the first did, not at comparing NaN."""
    traces = exams()[0].clone()
    traces[TRAIN[2], 16, 0] = math.nan
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="tracings hold it"):
            train(tmp_path, traces=traces)


@pytest.mark.parametrize("thing, other", [
    (np.float32(0.5), np.float32(0.25)), (np.int64(3), 4), (b"a", b"b"), (1j, 2j), (range(3), range(4)), ({1, 2}, {1, 3}),
    ({"a": {1: "x"}}, {"a": {2: "x"}}), (Path("a"), Path("b")), (np.sin, np.cos), (np.mean, np.median), (math.sin, math.cos),
    (torch.relu, torch.tanh), (torch.nn.ReLU, torch.nn.GELU), (np.array([1, 2]), np.array([1, 3])), (math.nan, math.inf),
    (pd.Series([1.0, 2.0]), pd.Series([1.0, 3.0])), (pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [1]})),
    (torch.arange(3), torch.arange(3) + 1), (functools.lru_cache(cells().half), functools.lru_cache(cells().double)),
    (torch.no_grad()(cells().half), torch.no_grad()(cells().double)), (SimpleNamespace(a=1), SimpleNamespace(a=2)),
], ids=lambda thing: getattr(thing, "__name__", type(thing).__name__))
def test_describe_is_stable_json_and_tells_values_apart(thing, other):
    def text(thing):
        notes = helpers.Notes()
        return json.dumps([helpers.describe(thing, notes), notes.code, notes.numbers], allow_nan=False)
    assert text(thing) == text(thing) != text(other)
    assert " at 0x" not in text(thing)


def test_describe_takes_bfloat16_integers_of_any_size_cycles_and_big_arrays():
    notes = helpers.Notes()
    cycle = SimpleNamespace(number=1)
    cycle.itself = [cycle]
    assert helpers.describe(cycle, notes)["itself"] == ["the same SimpleNamespace"]
    assert helpers.describe(torch.ones(2, dtype=torch.bfloat16), notes) == "array (2,)"
    assert helpers.describe(np.arange(4, dtype=np.int32), notes) == helpers.describe(torch.arange(4), notes)
    assert len(helpers.describe(np.zeros((10**5, 8)), notes)) < 40


# ------------------------------------------------------------------------------------------------
# Equal in two processes, in a notebook, in every Python version
# ------------------------------------------------------------------------------------------------
NOTEBOOK = r'''
import json, sys
from IPython.core.interactiveshell import InteractiveShell
sys.path.insert(0, {folder!r})
shell = InteractiveShell.instance()
for cell in json.load(open({cells!r})):
    result = shell.run_cell(cell)
    result.raise_error()
'''
TRAIN_CELL = '''
from functools import partial
import ecg_helpers as ecg

ecgs = torch.randn(12, 64, 8, generator=torch.Generator().manual_seed(1))
def run():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Net()
    loader = ecg.BatchLoader(ecgs, np.arange(12) % 2, np.arange(12), 6)
    ecg.fit(model, loader, loader, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), epochs=1, device="cpu",
            loss_function=torch.nn.BCEWithLogitsLoss(), run_dir=RUN, augment=partial(augment, strength=0.3),
            settings={"leads": {"I", "II", "V1"}})
run()
'''


def test_a_notebook_in_another_process_finds_the_run(tmp_path, capsys):
    """Classes and functions of notebook cells; a cell edited and edited back. Then the same cells in IPython."""
    pytest.importorskip("IPython")
    old, new, _ = EDITS["pooling"]
    session = [f"RUN = {str(tmp_path / 'run')!r}", CELLS, TRAIN_CELL, CELLS.replace(old, new), "run()", "1 + 1", CELLS,
               "run()"]
    load_cells(*session)
    assert is_trained(capsys.readouterr().out) == [True, True, False]
    (tmp_path / "cells.json").write_text(json.dumps(session))
    (tmp_path / "main.py").write_text(NOTEBOOK.format(folder=str(MODULE.parent), cells=str(tmp_path / "cells.json")))
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path / "ipython")}
    done = subprocess.run([sys.executable, "main.py"], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert is_trained(done.stdout) == [False, False, False], done.stdout


def is_trained(out):
    """For each line of an epoch: was it trained (not loaded)?"""
    return [not line.endswith("(loaded)") for line in out.splitlines() if line.startswith("epoch ")]


SNIPPET = r'''
import functools, math
OFFSET, other = 3, 4

def rich(a, b: int = 2, *args: str, c=None, **kw) -> "text":
    """Docstring."""
    total: float = 0.0
    unset: int
    text = f"{a!r:>{b}} {b + 1:.3f} {{}} {c=}" f"and {a:}" "joined" 'as one' + f"{'nested'}é😀\t"
    if (n := len(args)) > OFFSET and not kw:
        total += sum(x ** 2 for x in args if x) + [math.pi * y for y in args][0]
    match a:
        case {"k": [1, *rest], **more} | {"j": rest, **more}: return rest, more
        case str() | None if b: pass
        case (x, y) as pair: return pair[::2], pair[1:, ..., None]
        case _: total = -1e-9 + 0x1f + 1_000 + 2j + True
    try:
        with open(a) as f, open(b): yield from f
    except (OSError, ValueError) as error: raise KeyError(a) from error
    else: del total
    finally: b"bytes\x00"
    @functools.lru_cache(maxsize=None)
    def inner(z, /, *, w=OFFSET): return lambda q: q @ z - w
    class Local(dict):
        size = other
        async def method(self): return await self
    global OFFSET2; OFFSET2 = {**kw, "a": {1, 2}, "b": (*args,)}
    return inner if a in {"x", "y"} else Local

first, second = (lambda x: x + 1), (lambda x: x - 1)
'''
PURE = ("_digest", "_source_trees", "_functions_in", "_canonical", "_without_effect", "_compiled", "_globals_used", "_is_library")


def test_source_is_described_alike_in_every_python_version(tmp_path):
    """Without torch: the part of the description that looks at source code, in each interpreter of this machine."""
    tree = ast.parse(MODULE.read_text(encoding="utf-8"))
    pure = [ast.unparse(node) for node in tree.body if getattr(node, "name", None) in PURE]
    assert len(pure) == len(PURE)
    (tmp_path / "snippet.py").write_text(SNIPPET, encoding="utf-8")
    (tmp_path / "describe.py").write_text("\n".join([
        "import ast, dis, hashlib, json, linecache, sys, types", "from functools import lru_cache", "_NO_EFFECT = ()", *pure,
        "import snippet", "for function in (snippet.rich, snippet.first, snippet.second):",
        "    trees = _source_trees(function.__code__)", "    assert len(trees) == 1",
        "    used = sorted(_globals_used(function.__code__, vars(snippet)))",
        "    print(function.__name__, _digest(_canonical(trees[0])), used)"]), encoding="utf-8")
    said = {}
    for python in [sys.executable, *filter(None, (shutil.which(f"python3.{minor}") for minor in range(10, 15)))]:
        done = subprocess.run([python, "describe.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        if "command not found" not in done.stderr:  # a version manager's placeholder
            assert done.returncode == 0, f"{python}: {done.stderr[-2000:]}"
            said[python] = done.stdout
    reference = said.pop(sys.executable)
    digests = [line.split()[1] for line in reference.splitlines()]
    assert len(set(digests)) == 3 and "['OFFSET', 'other']" in reference
    assert all(text == reference for text in said.values()), said
    if not said:
        pytest.skip("no other Python on this machine")


# ------------------------------------------------------------------------------------------------
# The folder of a run
# ------------------------------------------------------------------------------------------------
def test_a_quick_look_leaves_the_long_run_alone(tmp_path):
    long = train(tmp_path, epochs=3)
    look = train(tmp_path, epochs=1)
    assert "epochs (1 instead of 3)" in look.said and look.folder != long.folder
    again = train(tmp_path, epochs=3)
    assert not trained(again) and again.history == long.history and "another run" not in again.said
    assert helpers.run_folder(tmp_path) == long.folder == again.folder


def test_an_edit_is_compared_with_the_run_that_was_used_last(tmp_path):
    """A, B, A, C: C is told apart from A, which was loaded just before, not from B, which was made last."""
    first = train(tmp_path, batch=6)
    train(tmp_path, batch=5)
    train(tmp_path, batch=6)
    third = train(tmp_path, batch=6, lr=0.03)
    assert f"another run than {first.folder.name}, which is kept" in third.said and "batch size" not in third.said


def test_the_folder_holds_a_readable_description(tmp_path):
    run = train(tmp_path / "exp1", augment=cells().augment)
    assert run.folder.parent == tmp_path / "exp1"
    assert {path.name for path in run.folder.iterdir()} == {"checkpoint.pt", "model.pth", "history.json", "description.json"}
    description = json.loads((run.folder / "description.json").read_text())["description"]
    assert description["optimiser"]["group 1"]["lr"] == 0.02 and description["model"]["type"] == "Net"
    assert {"Net.forward", "gain", "train_loop", "eval_loop"} <= set(description["code"])
    assert {"fit", "describe_run", "epoch_line"} & set(description["code"]) == {"fit"}


def test_overwrite_repeats_a_run_in_its_folder(tmp_path):
    first = train(tmp_path, epochs=2)
    again = train(tmp_path, epochs=2, overwrite=True)
    assert trained(again) == [1, 2] and again.folder == first.folder
    assert again.history["train_loss"] == first.history["train_loss"]


def test_a_damaged_description_fits_nothing_and_stops_nothing(tmp_path):
    first = train(tmp_path)
    (first.folder / "description.json").write_text('{"descr')
    run = train(tmp_path)
    assert trained(run) == [1] and run.folder != first.folder and (first.folder / "model.pth").exists()
    assert not trained(train(tmp_path))


def test_a_loaded_run_shows_its_lines_history_and_seconds(tmp_path):
    first, again = train(tmp_path, epochs=3), train(tmp_path, epochs=3)
    lines = [line for line in first.said.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 3
    assert again.said.splitlines() == [f"{line}  (loaded)" for line in lines]
    assert again.history == first.history and again.history["seconds"] == first.history["seconds"]
