"""Devices without a device: torch's `meta` device for placement, bfloat16 on the CPU for the mixed-precision path.

A tensor that stays on the CPU meets one on `meta` with "Tensor on device cpu is not on the expected device meta!".
"""
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import ecg_helpers as helpers

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
notebook_source = pytest.importorskip("notebook_source")

META, SHAPE = torch.device("meta"), (4, helpers.N_SAMPLES, len(helpers.LEADS))


def from_notebook(name, **given):
    """One definition of the notebook; `DEVICE` is the meta device there."""
    try:
        return notebook_source.definitions(name, DEVICE=META, SEED=0, **given)[name]
    except NameError as error:
        pytest.skip(f"the notebook has no such definition: {error}")


def networks():
    """name -> class or function that builds it."""
    models = {name: from_notebook(name) for name in ("ModelBaseline", "LinearModel", "Model", "AFNet")}
    plain = {"residual": False, "normalize": False}
    return {**models, "plain AFNet": lambda: models["AFNet"](**plain)}


@pytest.fixture
def no_autocast(monkeypatch):
    """Mixed precision, which is off in these tests, does not know the meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: nullcontext())


def meta_loader(n=10, batch_size=4, shuffle=True):
    return helpers.BatchLoader(torch.zeros(n, *SHAPE[1:], device=META), np.arange(n) % 2, np.arange(n), batch_size, shuffle)


# ------------------------------------------------------------------------------------------------
# Everything on one device
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["ModelBaseline", "LinearModel", "Model", "AFNet", "plain AFNet"])
@pytest.mark.parametrize("train", [True, False])
def test_each_network_runs_forwards_and_backwards_on_the_device_of_its_input(name, train):
    model = networks()[name]().to(META).train(train)
    logits = model(torch.zeros(SHAPE, device=META))
    assert logits.shape == (4, 1) and logits.device == META
    loss = helpers.weighted_loss(np.arange(8) % 4 == 0).to(META)(logits, torch.zeros(4, 1, device=META))
    loss.backward()
    assert all(weights.grad is not None and weights.grad.device == META for weights in model.parameters())


def test_augmentation_makes_its_tensors_on_the_device_of_the_batch():
    changed = from_notebook("augment_exams")(torch.zeros(SHAPE, device=META))
    assert changed.shape == SHAPE and changed.device == META and changed.dtype == torch.float32


def test_a_forgotten_device_would_be_found():
    """The check itself: noise made on the CPU raises."""
    with pytest.raises(RuntimeError, match="not on the expected device meta"):
        torch.zeros(SHAPE, device=META) + torch.randn(SHAPE)


def test_batches_stay_on_the_device_of_the_tracings():
    batches = list(meta_loader())
    assert len(batches) == 3
    assert all(part.device == META for batch in batches for part in batch)


@pytest.mark.parametrize("averaging", [True, False])
def test_train_loop_makes_everything_on_the_device(no_autocast, averaging):
    """All batches run, with augmentation, clipping, schedule and average; only the loss's value is not to be had."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(SHAPE[1] * SHAPE[2], 1)).to(META)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=99)
    parts = helpers._stateful_parts(model, optimizer, scheduler, 0.9 if averaging else None, None)
    with pytest.raises(RuntimeError, match="item.* cannot be called on meta tensors"):
        helpers.train_loop(1, meta_loader(), model, optimizer, torch.nn.BCEWithLogitsLoss(), META, max_norm=None,
                           augment=lambda x: x * 0.5, scheduler=scheduler, averaged=parts.get("averaged"))
    assert scheduler.last_epoch == 3
    assert all(weights.device == META for part in ("model", "averaged") if part in parts for weights in parts[part].parameters())


def test_eval_loop_and_predict_make_everything_on_the_device(no_autocast):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(SHAPE[1] * SHAPE[2], 1)).to(META)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        helpers.eval_loop(1, meta_loader(shuffle=False), model, torch.nn.BCEWithLogitsLoss(), META)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        helpers.predict(model, np.zeros(SHAPE, dtype=np.float32), META, shifts=(0, 5))


# ------------------------------------------------------------------------------------------------
# Mixed precision
# ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tracings():
    """32 exams; those of class 1 have a larger first lead."""
    traces = torch.randn(32, 256, 8, generator=torch.Generator().manual_seed(0))
    traces[::2, :, 0] *= 3
    return traces


class Net(torch.nn.Module):
    """Notes the type that its convolution works in."""

    def __init__(self):
        super().__init__()
        self.convolution, self.last = torch.nn.Conv1d(8, 8, 5), torch.nn.Linear(8, 1)

    def forward(self, traces):
        return self.last(self.convolution(traces.transpose(1, 2)).abs().mean(dim=2))


def train(run_dir, traces, amp_dtype):
    torch.manual_seed(0)
    model, y, types = Net(), np.arange(32) % 2 == 0, set()
    model.convolution.register_forward_hook(lambda module, batch, result: types.add(result.dtype))
    history = helpers.fit(model, helpers.BatchLoader(traces, y, np.arange(24), 8, shuffle=True),
                          helpers.BatchLoader(traces, y, np.arange(24, 32), 8), device="cpu", run_dir=run_dir, epochs=4,
                          optimizer=torch.optim.Adam(model.parameters(), 0.05), amp_dtype=amp_dtype, max_norm=1.0,
                          loss_function=torch.nn.BCEWithLogitsLoss(), ema_decay=0.5)
    return model, history, types


def test_mixed_precision_trains_to_nearly_the_same_numbers(tmp_path, tracings):
    _, full, types = train(tmp_path / "full", tracings, None)
    assert types == {torch.float32}
    model, mixed, types = train(tmp_path / "mixed", tracings, torch.bfloat16)
    assert types == {torch.bfloat16}
    assert mixed["train_loss"] == pytest.approx(full["train_loss"], rel=0.02) and mixed["train_loss"] != full["train_loss"]
    assert all(weights.dtype == torch.float32 for weights in model.parameters())
    logits = helpers.predict(model, tracings, "cpu", amp_dtype=torch.bfloat16)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, helpers.predict(model, tracings, "cpu"), atol=0.05 * np.ptp(logits))


def test_a_run_in_mixed_precision_loads_without_it(tmp_path, tracings, capsys):
    """What a GPU has trained, a laptop submits."""
    _, first, _ = train(tmp_path, tracings, torch.bfloat16)
    capsys.readouterr()
    _, again, types = train(tmp_path, tracings, None)
    assert again == first and not types
    assert capsys.readouterr().out.count("(loaded)") == 4


def test_overflow_in_half_precision_is_found_where_it_happens(tracings):
    """The cause of a loss that is not finite is looked for in the precision of the training."""
    model = Net()
    loader = helpers.BatchLoader(1e5 * tracings, np.zeros(32), np.arange(32), 8)  # float16 ends at 65,504
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for amp_dtype, cause in ((torch.float16, "in batch 1 the forward pass makes it"), (None, "the loss overflowed")):
        error = helpers.not_finite("training loss is nan", 1, 0.1, model, weights, loader, torch.nn.BCEWithLogitsLoss(),
                                   torch.device("cpu"), amp_dtype=amp_dtype)
        assert cause in str(error)


# ------------------------------------------------------------------------------------------------
# Tracings that do not fit
# ------------------------------------------------------------------------------------------------
def test_tracings_that_do_not_fit_are_mapped_and_give_the_same_batches(demo_h5, capsys):
    in_memory = helpers.load_tracings(demo_h5)
    assert "do not fit" not in capsys.readouterr().out
    before = demo_h5.read_bytes()
    mapped = helpers.load_tracings(demo_h5, max_bytes=1)
    assert "do not fit into memory; read from the disk" in capsys.readouterr().out
    with h5py.File(demo_h5) as file:
        np.testing.assert_array_equal(mapped.numpy(), file["tracings"][:])
    order = np.random.default_rng(0).permutation(len(mapped))
    for (a, _), (b, _) in zip(*(helpers.BatchLoader(traces, order, order, 7) for traces in (in_memory, mapped))):
        assert torch.equal(a, b) and b.is_contiguous()
    mapped[0] = 0.0  # stays in memory
    assert demo_h5.read_bytes() == before
    again = helpers.load_tracings(demo_h5, max_bytes=1)
    loaders = [helpers.BatchLoader(traces, order, order, 7) for traces in (in_memory, again)]
    assert len({json.dumps(helpers.describe(loader, helpers.Notes())) for loader in loaders}) == 1, "another run"
